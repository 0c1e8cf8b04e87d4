"""diffusers: its models from directories and single files, its pipelines, distributed."""
