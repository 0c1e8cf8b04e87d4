"""WHAT the bytes mean: block formats, and weights that compute as stored."""
