"""FM9G4B-V: SigLIP on slices of any shape, a windowed resampler of its own, the FM9G decoder with latent attention."""
