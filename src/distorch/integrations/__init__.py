"""WHO asks: any module, transformers; each asks the executor for blocks."""
