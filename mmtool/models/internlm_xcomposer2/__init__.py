"""InternLM-XComposer2 and 2.5: CLIP ViT-L/14, a two-layer projector, InternLM2-7B with low-rank paths for images."""
