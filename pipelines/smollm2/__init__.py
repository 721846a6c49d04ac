"""Language models on real text: SmolLM2-135M labels, small students learn."""
