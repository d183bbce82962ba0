"""GleSAM at full size: SAM and SAM 2 with the one-step latent enhancer; needs torch (extra `glesam` of setup.py)."""
