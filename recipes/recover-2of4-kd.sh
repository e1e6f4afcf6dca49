# 2:4, then 300 steps of training on the kept weights towards the dense model's predictions; the zeros stay, and a held-out text chooses the step.
llmprune prune --model llama --pattern 2:4 --output llama-2of4
llmprune recover llama-2of4 --data bundled-calibration --loss kd --steps 300 --eval bundled-evaluation --output llama-2of4-recovered
llmprune inspect llama-2of4-recovered --verify 2:4
