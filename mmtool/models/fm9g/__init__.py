"""FM9G text models: one decoder with grouped or latent attention, with or without MuP factors and biases."""
