"""ComfyUI's protocol: workflows as jobs of the service, their messages over a websocket, and their files."""
