"""Module names of a Llama for each value of `lora.targets`; driver and worker both use them."""

TARGET_GROUPS = {
    "attention_qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
LLAMA_MODULES = (*TARGET_GROUPS["attention"], *TARGET_GROUPS["mlp"])
