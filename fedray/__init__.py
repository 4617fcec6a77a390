"""fedray simulates federated fine-tuning of language models on Ray."""
