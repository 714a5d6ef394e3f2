# %% [markdown]
# # A sweep in a notebook
# LoRA trains a small adapter over a frozen base model, and the rank sets the size of the adapter.
# Does SmolLM2 need rank 16 to learn the travel data set, or is rank 4 enough?
#
# This takes about two minutes on a CPU. VS Code and Jupyter (with jupytext) open this file as a
# notebook; `python examples/quickstart.py` runs it as a script.

# %%
import os

import tinyllama_lab as lab

MODEL = os.environ.get("QUICKSTART_MODEL", "smollm2")  # tinyllama needs a GPU

# %% [markdown]
# ## Run the sweep
# Two ranks with two seeds each make four adapters, trained together over one base. A seed decides
# the first values of an adapter and the order of the rows. If you run the cell again, nothing is
# trained twice.

# %%
study = lab.run_sweep(
    [
        f"model={MODEL}",
        "data=travel",
        "data.n=24",
        "data.eval_n=32",
        "lora.r=4,16",
        "seeds=2",
        "train.batch_size=4",
        "eval.generations=2",
        "eval.max_new_tokens=40",
        "eval.latency_tokens=0",  # no measurement of the generation speed
        "confirm=off",  # no further training to confirm the recommendation
    ],
    study="notebook",
)

# %% [markdown]
# ## Look at the trials
# The loss is in nats per token, on held-out rows that are never trained on. Lower is better.

# %%
frame = study.to_frame()
print(frame[["trial", "state", "lora.r", "seed", "eval/loss", "eval/perplexity"]])
print("before any training:", study.base().metrics["eval/loss"])

# %%
losses = frame[frame["compared"]].groupby("lora.r")["eval/loss"].agg(["mean", "min", "max"])
print(losses)
axes = losses.plot(marker="o", xlabel="rank", ylabel="held-out loss, nats per token")

# %% [markdown]
# ## Read what the study shows
# A verdict compares the two ranks, with a 95 % interval for the difference of their losses.

# %%
print(study.recommendation())
for verdict in study.verdicts():
    print("-", verdict)

# %% [markdown]
# ## Use the recommended adapter

# %%
trial = study.recommendation().trials[0]
model = trial.load_adapter()
tokenizer = trial.load_tokenizer()
messages = [{"role": "user", "content": "Which bus goes from Kathmandu to Pokhara?"}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**prompt.to(model.device), max_new_tokens=40, do_sample=False)
answer = tokenizer.decode(output[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
