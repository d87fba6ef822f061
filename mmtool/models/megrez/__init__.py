"""Megrez-3B: Omni sees and hears (SigLIP on slices, Whisper's encoder), Instruct reads; both write with one Llama."""
