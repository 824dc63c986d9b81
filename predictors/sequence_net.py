"""Small sequence models over expert use: from what earlier requests used to what the next will use.

Plain `nn.Module`s; the transformer is the transformers library's own, built small and from scratch.
Knows nothing of traces, of training, or of when it is called.

Source: eMoE §3.2.2, which names two forms of sequence and a model, and gives neither layout, heads
nor loss. Here an element of a sequence is a vector of shares of use, not a list of chosen indices,
so that an element carries a whole request; the head is one logit per expert and layer.

Shape letters: B windows · M requests in a window, oldest first · L MoE layers · E experts per layer
· D hidden.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from predictors.token_use import log_odds

Architecture = Literal["xlnet", "gpt2", "bert"]
Start = Literal["counts", "popularity"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
_NUM_HEADS = 4
_UNUSED = (
    *("word_embedding.weight", "word_embeddings.weight", "wte.weight"),
    *("mask_emb", "seg_embed", "r_s_bias"),
)


def make_backbone(
    architecture: Architecture,
    *,
    hidden_size: int,
    depth: int,
    dropout: float,
    num_positions: int,
    causal: bool,
) -> nn.Module:
    """A transformer with random weights that reads `inputs_embeds` [B, num_positions, D].

    Args:
        architecture: GPT-2 looks back alone, whatever ``causal`` says.
        hidden_size: D, a multiple of 4 (its heads).
        depth: Transformer layers.
        dropout: In all of them.
        num_positions: The longest sequence.
        causal: No position sees a later one.
    """
    # Seconds to import, and every predictor's user imports this file.
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, XLNetConfig, XLNetModel

    if architecture == "xlnet":
        backbone: nn.Module = XLNetModel(
            XLNetConfig(
                vocab_size=1,
                d_model=hidden_size,
                n_layer=depth,
                n_head=_NUM_HEADS,
                d_inner=4 * hidden_size,
                dropout=dropout,
                attn_type="uni" if causal else "bi",
                use_mems_eval=False,
                use_mems_train=False,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    elif architecture == "gpt2":
        backbone = GPT2Model(
            GPT2Config(
                vocab_size=1,
                n_positions=num_positions,
                n_embd=hidden_size,
                n_layer=depth,
                n_head=_NUM_HEADS,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                use_cache=False,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    else:
        backbone = BertModel(
            BertConfig(
                vocab_size=1,
                hidden_size=hidden_size,
                num_hidden_layers=depth,
                num_attention_heads=_NUM_HEADS,
                intermediate_size=4 * hidden_size,
                max_position_embeddings=num_positions,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                is_decoder=causal,
                use_cache=False,
                pad_token_id=None,
            ),
            add_pooling_layer=False,
        )
    # What only words, segments or XLNet's second stream would use gets no gradient, and data
    # parallel training refuses parameters without one.
    for name, parameter in backbone.named_parameters():
        if name.endswith(_UNUSED):
            parameter.requires_grad_(False)
    return backbone


class SequenceNet(nn.Module, ABC):
    """What both forms share: input scaling, backbone, and a head of E logits per layer.

    Args:
        popularity_LE: float32 mean use; what a missing request counts as.
        scale: Of the inputs, about the standard deviation of use.
        input_size: Numbers per element of the sequence.
        num_positions, causal, architecture, hidden_size, depth, dropout: `make_backbone` has them.
    """

    popularity_LE: Tensor
    scale: Tensor

    def __init__(
        self,
        popularity_LE: Tensor,
        *,
        scale: float,
        input_size: int,
        num_positions: int,
        causal: bool,
        architecture: Architecture,
        hidden_size: int,
        depth: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.register_buffer("popularity_LE", popularity_LE)
        self.register_buffer("scale", torch.tensor(scale))
        self.embed = nn.Linear(input_size, hidden_size)
        self.backbone = make_backbone(
            architecture,
            hidden_size=hidden_size,
            depth=depth,
            dropout=dropout,
            num_positions=num_positions,
            causal=causal,
        )
        # Zero: an untrained net says what it starts from.
        self.head_LED = nn.Parameter(torch.zeros(*popularity_LE.shape, hidden_size))
        self.bias_LE = nn.Parameter(torch.zeros_like(popularity_LE))

    @abstractmethod
    def forward(self, window_BMLE: Tensor, next_BLE: Tensor | None = None) -> Tensor:
        """Logits float32 [B, L, E] of the share of the next request's tokens per expert.

        Args:
            window_BMLE: float32 use of the requests before it.
            next_BLE: Its own use, which training may teach with; never given when forecasting.
        """

    def _scaled(self, use: Tensor) -> Tensor:
        return (use - self.popularity_LE) / self.scale


class PromptSequence(SequenceNet):
    """eMoE-A: all layers of the next prompt at once, from all layers of the previous prompts.

    A sequence element is a previous prompt; a learned last element stands for the next one, and the
    backbone's output there is read. What is learned is added to log odds of (``start``):

    - "popularity": mean use of the fitted requests, as a bias would be. The paper's.
    - "counts": a learned mixture of popularity and each previous prompt's use: a weighted bag of
      counts, so that the sequence model starts from the best of those. Ours.

    Args:
        popularity_LE: float32 mean use.
        scale: Of the inputs.
        window: M.
        start: As above.
        options: architecture, hidden_size, depth, dropout.
    """

    def __init__(
        self, popularity_LE: Tensor, *, scale: float, window: int, start: Start, **options: Any
    ) -> None:
        super().__init__(
            popularity_LE,
            scale=scale,
            input_size=popularity_LE.numel(),
            num_positions=window + 1,
            causal=False,
            **options,
        )
        self.next_D = nn.Parameter(0.02 * torch.randn(self.embed.out_features))
        self.start = start
        if start == "counts":
            self.mixture_M1 = nn.Parameter(torch.zeros(window + 1))

    def forward(self, window_BMLE: Tensor, next_BLE: Tensor | None = None) -> Tensor:
        """Logits float32 [B, L, E]; looks at nothing of the next request."""
        known_BMD = self.embed(self._scaled(window_BMLE).flatten(2))
        next_B1D = self.next_D.expand(len(known_BMD), 1, -1)
        elements = torch.cat([known_BMD, next_B1D], dim=1)
        hidden_BD = self.backbone(inputs_embeds=elements).last_hidden_state[:, -1]
        learned_BLE = torch.einsum("bd,led->ble", hidden_BD, self.head_LED) + self.bias_LE
        if self.start == "popularity":
            return log_odds(self.popularity_LE) + learned_BLE
        mixture_M1 = self.mixture_M1.softmax(dim=0)  # the last one weighs popularity
        counted_BLE = torch.einsum("m,bmle->ble", mixture_M1[:-1], window_BMLE)
        return log_odds(counted_BLE + mixture_M1[-1] * self.popularity_LE) + learned_BLE


class LayerSequence(SequenceNet):
    """eMoE-L: layer by layer within the next prompt, e_i = f(e_1..e_{i-1}); L calls.

    A sequence element is a layer. The first element is the previous prompt's first layer, from
    which the next prompt's first layer is predicted (the paper takes it over unchanged); the
    prediction of a layer is the input for the next one. Training is shown the layers that the
    request really used, as is usual for a model of sequences. Starts from popularity.

    Args:
        popularity_LE: float32 mean use.
        scale: Of the inputs.
        options: architecture, hidden_size, depth, dropout.
    """

    def __init__(self, popularity_LE: Tensor, *, scale: float, **options: Any) -> None:
        num_layers, num_experts = popularity_LE.shape
        super().__init__(
            popularity_LE,
            scale=scale,
            input_size=num_experts,
            num_positions=num_layers,
            causal=True,
            **options,
        )
        self.layer_LD = nn.Parameter(0.02 * torch.randn(num_layers, self.embed.out_features))

    def forward(self, window_BMLE: Tensor, next_BLE: Tensor | None = None) -> Tensor:
        """Logits float32 [B, L, E]; without ``next_BLE`` from its own predictions alone."""
        first_B1E = self._scaled(window_BMLE[:, -1])[:, :1]
        if next_BLE is not None:
            return self._logits(torch.cat([first_B1E, self._scaled(next_BLE)[:, :-1]], dim=1))
        inputs = first_B1E
        while True:
            logits = self._logits(inputs)
            layer = inputs.shape[1]
            if layer == len(self.layer_LD):
                return logits
            said_BE = logits[:, -1].sigmoid()
            said_B1E = ((said_BE - self.popularity_LE[layer - 1]) / self.scale)[:, None]
            inputs = torch.cat([inputs, said_B1E], dim=1)

    def _logits(self, inputs_BLE: Tensor) -> Tensor:
        num_layers = inputs_BLE.shape[1]
        elements_BLD = self.embed(inputs_BLE) + self.layer_LD[:num_layers]
        hidden_BLD = self.backbone(inputs_embeds=elements_BLD).last_hidden_state
        learned_BLE = torch.einsum("bld,led->ble", hidden_BLD, self.head_LED[:num_layers])
        return (log_odds(self.popularity_LE) + self.bias_LE)[:num_layers] + learned_BLE
