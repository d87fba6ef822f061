"""Any model that transformers itself knows: its own class, its own processor, its own chat template."""
