"""Benchmarks on an accelerator: streaming from pinned memory and disk, ours beside others."""
