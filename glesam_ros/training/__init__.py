"""Training of the embedded model; needs torch (`pip install glesam_ros[train]`)."""
