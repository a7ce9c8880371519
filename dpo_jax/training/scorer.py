"""From packed rows to scores of pairs, and from these to the loss."""

import dataclasses

import jax
import jax.numpy as jnp

from dpo_jax.losses import logprobs, modifiers, objectives
from dpo_jax.losses.registry import PairLogps
from dpo_jax.models import config as model_config
from dpo_jax.models import heads, lora, moe, transformer
from dpo_jax.training import metrics as metrics_lib
from dpo_jax.types import Array, Batch, Params, Rows

LossState = dict[str, Array] | None  # f32[]  running means of a loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairScores:
  """What a pass over the rows yields for each pair of the batch."""

  policy: Array  # f32[B,C]  summed log-probability, nats; or score
  reference: Array | None  # f32[B,C]
  log_weights: Array | None = None  # f32[B]  log of WPO's pair weight
  routing: moe.Routing | None = None  # of the policy's experts, in training


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Turns rows into log-probabilities under the policy and the reference.

  Attributes:
    policy: configuration of the policy's decoder.
    reference: configuration of the reference's; None never traces it, and
      its log-probabilities come with the batch if the loss needs them.
    objective: the loss with its modifiers.
    chunk_length: scored positions of a row that meet the vocabulary at once.
    has_pairs: whether the data has prompts with two responses.
    router_loss: weight, at least 0, of the policy's load-balancing loss; its
      metrics come only with a model that has experts.
  """

  policy: model_config.ModelConfig
  reference: model_config.ModelConfig | None
  objective: objectives.Objective
  chunk_length: int
  has_pairs: bool = True
  router_loss: float = 0.0

  def scores(
    self,
    params: Params,
    reference_params: Params | None,
    rows: Rows,
    lengths: Array,
    base: Params | None = None,
    *,
    with_routing: bool = False,
  ) -> PairScores:
    """Returns the scores of the pairs in `rows`, and 0 for all others.

    The reference and the weights carry no gradient. `base` is what adapters
    are added to, where the parameters are that; see `lora.over`.
    `with_routing` adds what the policy's experts saw, if it has any.
    """
    params = lora.over(base, params)
    weights = self.objective.token_weights(rows, lengths)
    reference = None
    if self.reference is not None:
      reference_params = lora.over(base, reference_params)
      tokens, _ = self._token_logps(self.reference, reference_params, rows)
      reference = jax.lax.stop_gradient(
        logprobs.response_sums(tokens.logps * weights, rows, lengths.shape)
      )
    tokens, routing = self._token_logps(
      self.policy, params, rows, self.objective.needs_log_sum_squares
    )
    policy = logprobs.response_sums(tokens.logps * weights, rows, lengths.shape)
    log_weights = None
    if self.objective.needs_log_sum_squares:
      log_weights = modifiers.wpo_log_weights(tokens, rows, lengths)
    routing = routing if with_routing else None
    return PairScores(policy, reference, log_weights, routing)

  def losses(
    self,
    scores: PairScores,
    lengths: Array,
    loss_state: LossState = None,
    score_gaps: Array | None = None,
  ) -> Array:
    """Returns f[B], the loss of each pair."""
    pairs = self._pair_logps(scores, lengths, score_gaps)
    return self.objective.per_pair(pairs, scores.log_weights, loss_state)

  def next_loss_state(
    self, scores: PairScores, lengths: Array, loss_state: LossState
  ) -> LossState:
    """Returns the loss state after this batch."""
    pairs = self._pair_logps(scores, lengths)
    return self.objective.next_state(pairs, loss_state)

  def mean_loss(
    self,
    scores: PairScores,
    batch: Batch,
    loss_state: LossState,
    here: Array | None = None,
  ) -> tuple[Array, Array]:
    """Returns the batch mean over the pairs that are `here`, and f[B].

    With routing, the weighted load-balancing loss is added to the mean: its
    share of the batch's tokens. Differs: as everywhere, it is the mean over
    microbatches of each one's, and so depends on the split.
    """
    valid = jnp.any(self._of_responses(batch.lengths) > 0, axis=1)
    here = valid if here is None else valid & here
    losses = self.losses(scores, batch.lengths, loss_state, batch.score_gaps)
    losses = jnp.where(here, losses, 0)
    mean = jnp.sum(losses) / jnp.sum(valid)
    if scores.routing is not None:
      num_tokens = jnp.sum(batch.rows.key_start < batch.rows.key_end)
      share = scores.routing.num_tokens / num_tokens
      balance = scores.routing.load_balancing_loss()
      mean += self.router_loss * share * balance
    return mean, losses

  def metrics(
    self, scores: PairScores, losses: Array, lengths: Array
  ) -> dict[str, Array]:
    """Returns the means of losses, rewards and log-probabilities."""
    if self.policy.head != "vocabulary":
      return metrics_lib.score_metrics(
        losses,
        scores.policy,
        lengths,
        is_labelled=self.objective.inputs == "labelled",
      )
    reference = scores.reference
    found = metrics_lib.preference_metrics(
      losses,
      self._of_responses(scores.policy),
      None if reference is None else self._of_responses(reference),
      self._of_responses(lengths),
      beta=self.objective.beta,
      has_rejected=self.objective.inputs != "demonstrations",
      has_pairs=self.has_pairs,
    )
    mismatched = self._pair_logps(scores, lengths).mismatched_logratio
    if mismatched is not None:
      num_valid = jnp.sum(jnp.any(self._of_responses(lengths) > 0, axis=1))
      found["kl"] = jnp.sum(mismatched) / num_valid
    return found

  def _of_responses(self, columns: Array) -> Array:
    """Returns the columns of responses, without what else is scored."""
    return columns[:, : columns.shape[1] - len(self.objective.extra_columns)]

  def _pair_logps(
    self, scores: PairScores, lengths: Array, score_gaps: Array | None = None
  ) -> PairLogps:
    counts = lengths.astype(scores.policy.dtype)
    of_responses = self._of_responses(counts)
    policy, reference = scores.policy, scores.reference
    fields = {}
    if "prompt" in self.objective.extra_columns:
      fields["policy_prompt"] = policy[:, -1]
      fields["prompt_lengths"] = counts[:, -1]
    if reference is not None:
      logratios = policy - reference
      if "mismatched" in self.objective.extra_columns:
        at = of_responses.shape[1]
        fields["mismatched_logratio"] = logratios[:, at]
      if self.objective.inputs == "ranked":
        fields["ranked_logratios"] = self._of_responses(logratios)
        fields["ranked_lengths"] = of_responses
    return PairLogps(
      policy_chosen=policy[:, 0],
      policy_rejected=policy[:, 1],
      reference_chosen=None if reference is None else reference[:, 0],
      reference_rejected=None if reference is None else reference[:, 1],
      chosen_lengths=counts[:, 0],
      rejected_lengths=counts[:, 1],
      score_gaps=score_gaps,
      **fields,
    )

  def _token_logps(self, config, params, rows, with_log_sum_squares=False):
    """Returns TokenLogps, and moe.Routing where there are experts.

    With a scalar head, scores stand where log-probabilities would.
    """
    arrays = (rows.tokens, rows.positions, rows.key_start, rows.key_end)
    routing = None
    if config.num_experts:
      hidden, routing = transformer.hidden_states_and_routing(
        config, params, *arrays
      )
    else:
      hidden = transformer.hidden_states(config, params, *arrays)
    if config.head != "vocabulary":
      return logprobs.TokenLogps(heads.scores(params, hidden, rows)), routing
    tokens = logprobs.token_logps(
      hidden,
      transformer.unembedding(config, params),
      rows,
      chunk_length=self.chunk_length,
      with_log_sum_squares=with_log_sum_squares,
    )
    return tokens, routing
