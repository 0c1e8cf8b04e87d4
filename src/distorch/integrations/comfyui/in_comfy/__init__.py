"""What runs inside ComfyUI only: these modules import it."""
