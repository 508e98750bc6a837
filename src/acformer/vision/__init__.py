"""Image encoder in, `VisionFeatures` out."""
