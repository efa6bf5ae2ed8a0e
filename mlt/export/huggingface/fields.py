"""Reading a config.json strictly: every key is used, known not to matter, or refused; all complaints at once."""

from collections.abc import Mapping
from typing import Any

from mlt.errors import UserError

# Keys that change no logit: provenance, generation, initialization, training losses, kernels.
IGNORED = frozenset(
    """
    _attn_implementation _name_or_path add_cross_attention architectures attention_dropout auto_map
    begin_suppress_tokens bos_token_id chunk_size chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id dtype embd_pdrop eos_token_id finetuning_task id2label initializer_range is_decoder
    is_encoder_decoder keys_to_ignore_at_inference label2id mamba_chunk_size max_position_embeddings max_window_layers
    model_type num_logits_to_keep output_attentions output_hidden_states output_router_logits pad_token_id prefix
    pretraining_tp problem_type pruned_heads rescale_prenorm_residual residual_in_fp32 return_dict
    router_aux_loss_coef router_jitter_noise sep_token_id task_specific_params time_step_floor time_step_max
    time_step_min time_step_rank tokenizer_class torch_dtype torchscript transformers_version use_cache
    use_mamba_kernels z_loss_coefficient
    """.split()  # noqa: SIM905
)


class Fields:
    """The values of a config.json, each read once by name.

    Args:
        values: the parsed file.
        where: its path, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self._used: set[str] = set()
        self._refused: list[str] = []

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where the key is absent or null."""
        self._used.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value of a key that must be there.

        Raises:
            UserError: it is not.
        """
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.where}: has no {key}, which its architecture needs")
        return value

    def only(self, key: str, *allowed: Any, default: Any) -> Any:
        """The value, refused unless it is one of these."""
        value = self.get(key, default)
        if value not in allowed:
            self.refuse(key, value, "only " + " or ".join(map(repr, allowed)) + " can be expressed")
        return value

    def refuse(self, key: str, value: Any, why: str) -> None:
        self._used.add(key)
        self._refused.append(f"  {key} = {value!r}: {why}")

    def finish(self) -> None:
        """Report what was refused and every key that nobody read.

        Raises:
            UserError: there is any.
        """
        unread = {k: v for k, v in self.values.items() if k not in self._used | IGNORED and v is not None}
        lines = [*self._refused, *(f"  {key} = {value!r}: not known to this map" for key, value in sorted(unread.items()))]
        if lines:
            count = "a setting" if len(lines) == 1 else "settings"
            raise UserError(
                f"{self.where}: {count} of {self.values.get('model_type')} that cannot be imported:\n" + "\n".join(lines)
            )
