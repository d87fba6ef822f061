"""The small model that ships in the package: the Yi-VL architecture, trained on drawn pictures."""
