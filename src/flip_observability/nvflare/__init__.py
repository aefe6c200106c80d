"""Everything that stands on NVFLARE; nothing outside this package and the demo imports it."""
