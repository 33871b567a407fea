"""ComfyUI's workflows on the compiled engine."""
