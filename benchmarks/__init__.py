"""What observing costs, and how fast results leave: measured beside NVFLARE's own collector and FLIP's own upload."""
