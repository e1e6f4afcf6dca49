# Adapters that keep the zeros: far fewer numbers are trained, and merging them into a pruned model fills nothing.
llmprune prune --model llama --sparsity 0.6 --output llama-60
llmprune recover llama-60 --data bundled-calibration --parameters lora --rank 16 --steps 200 --output llama-60-lora
