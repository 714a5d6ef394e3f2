# %% [markdown]
# # A sweep in a notebook
# Does SmolLM2 need a rank of 16 to learn the travel data set, or is 4 enough? This takes about two
# minutes on a CPU. Editors such as VS Code and Jupyter (with jupytext) open this file as a
# notebook; `python examples/quickstart.py` runs it as a script.

# %%
import os

import tinyllama_lab as lab

MODEL = os.environ.get("QUICKSTART_MODEL", "smollm2")  # tinyllama wants a GPU

# %% [markdown]
# ## Run the sweep
# Two ranks with two seeds each: four adapters, trained together over one frozen base. Run the cell
# again, and nothing is trained twice.

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
        "eval.latency_tokens=0",
        "confirm=off",
    ],
    study="notebook",
)

# %% [markdown]
# ## Look at the trials

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
