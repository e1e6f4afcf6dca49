"""Short names of models. ``llama`` is bundled with the package; the others stand for Hub ids."""

ALIASES: dict[str, str | None] = {
    "llama": None,
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "gemma-3-1b": "google/gemma-3-1b-pt",
    "opt-125m": "facebook/opt-125m",
    "gpt2": "openai-community/gpt2",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
}
