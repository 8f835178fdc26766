"""Any checkpoint that can be read, written anew as safetensors files."""
