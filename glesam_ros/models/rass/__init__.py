"""SCR and RASS at full size, restoration and semantic maps by Stable Diffusion; needs torch (`glesam` extra)."""
