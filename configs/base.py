"""Every key, its default and its unit. Other configs change some of them.

`None` stands for "not given": the loss, optimizer or tokenizer then takes its
own value. Nothing is ignored: a key that the chosen loss or optimizer cannot
honour is an error.
"""

from ml_collections import config_dict

placeholder = config_dict.placeholder


def get_config() -> config_dict.ConfigDict:
  """Returns the defaults of Rafailov et al. 2023, appendix B."""
  config = config_dict.ConfigDict()
  config.seed = 0  # shuffling and random initialisation
  config.steps = 0  # updates; above 0 it wins over `epochs`
  config.epochs = 1  # passes over the pairs; the last batch may wrap around
  config.batch_size = 64  # pairs (or demonstrations) in an update
  # Rows that are in memory at once; 0: one per device that splits rows.
  config.microbatch_rows = 0

  config.data = config_dict.ConfigDict()
  config.data.source = "jsonl"  # hh, imdb, jsonl, hub, synthetic, tldr
  config.data.path = ""  # file, hub name, or what the source takes
  config.data.split = "train"  # of a hub dataset, or of the posts of tldr
  config.data.eval_path = ""  # empty: no evaluation
  config.data.eval_split = "test"
  config.data.shuffle = True  # False: file order
  config.data.max_length = 512  # tokens of prompt and one response
  config.data.max_prompt_length = 256  # tokens
  # Tokens in a row; 0: the multiple of 128 that suits the longest pair.
  config.data.row_length = 0
  # mirrored; padded: two sequences a pair, also where a window asks for them.
  config.data.layout = "mirrored"
  config.data.cache_dir = ""  # empty: ~/.cache/dpo_jax

  config.model = config_dict.ConfigDict()
  # Hugging Face folder, hub name, run folder, or runs/x/checkpoints/<step>.
  config.model.path = ""
  config.model.preset = ""  # random initialisation instead of a path
  config.model.vocab_size = 0  # of a preset; 0: the tokenizer's
  # Rows of embedding and head, up to a multiple; a mesh.tensor that divides it
  # splits them. Exports have the model's own.
  config.model.vocab_multiple = 1
  config.model.tokenizer = ""  # folder, file, hub name; empty: as `path`
  config.model.dtype = "auto"  # of matmuls; auto: bfloat16, float32 on CPU
  config.model.param_dtype = "float32"  # of the master weights
  config.model.remat = "none"  # none, dots, full
  config.model.router_loss = 0.001  # weight of load balancing among experts
  config.model.logprob_chunk = 128  # scored positions a row that meet V at once

  # Adapters of low rank, trained in place of the model at `model.path`.
  config.lora = config_dict.ConfigDict()
  config.lora.rank = 0  # 0: none, all weights are trained
  config.lora.alpha = placeholder(float)  # scale * rank; None: 2 * rank
  # Regular expression of whole names: query, key, value, out, up, gate, down;
  # empty: all of them.
  config.lora.targets = ""
  config.lora.path = ""  # run folder or PEFT folder of those to start from
  # Of the frozen weights: float32, bfloat16, or int8 kernels of projections
  # (needs the package qwix and model.remat); auto: as model.dtype.
  config.lora.base_dtype = "auto"

  config.loss = config_dict.ConfigDict()
  # A name of configs/losses.py, or a weighted sum: dpo:0.8,bco_pair:0.2,sft:1
  config.loss.name = "dpo"
  config.loss.beta = placeholder(float)  # strength of the reference, > 0
  config.loss.label_smoothing = placeholder(float)  # in [0, 1/2)
  config.loss.tau = placeholder(float)  # discopop: temperature
  # unlikelihood: weight of rejected, in [0, 1]; cpo: weight of the chosen NLL;
  # rdpo: reward of a token; beta_dpo: change of beta per unit of margin; odpo:
  # weight of the log of the score difference; alpha_po: bend of the reward.
  config.loss.alpha = placeholder(float)
  config.loss.momentum = placeholder(float)  # beta_dpo: of the running margin
  # kto, bco, apo_zero_unpaired: above 0.
  config.loss.desirable_weight = placeholder(float)
  config.loss.undesirable_weight = placeholder(float)
  # simpo, alpha_po: target margin, in reward; repo: in nats of a mean token.
  config.loss.gamma = placeholder(float)  # at least 0
  config.loss.eta = placeholder(float)  # rpo_*, rebel: of the score gap, > 0
  config.loss.shift = placeholder(float)  # dpo_shift: of rejected, in (0, 1]
  config.loss.delta = placeholder(float)  # slic: margin, nats
  # dpop: of the penalty; orpo: of the odds ratio; slic: of the chosen NLL.
  config.loss.lambda_ = placeholder(float)  # weight, at least 0
  config.loss.r_max = placeholder(float)  # chi_po: bound of rewards, > 0
  # reward_model: of the squared sum of a pair's scores, at least 0
  config.loss.center_weight = placeholder(float)
  config.loss.f_divergence = "reverse_kl"  # forward_kl, js, alpha
  config.loss.f_alpha = placeholder(float)  # of f_divergence alpha, not 1
  config.loss.ld_alpha = 1.0  # weight of tokens past the shorter response
  config.loss.wpo = False  # weight pairs by the policy's own probability
  config.loss.wpo_max_weight = 1.0  # bound of that weight, > 0; inf: none
  config.loss.sft_weight = 0.0  # weight of the chosen responses' token mean NLL
  config.loss.prompt_nll = False  # sft, orpo: whether it covers prompts too

  # Of loss.name "ppo", whose responses are sampled: `data` gives its prompts,
  # `steps` are iterations and `batch_size` is the responses of one.
  config.ppo = config_dict.ConfigDict()
  # synthetic (the true reward of synthetic reviews); run:FOLDER of a reward
  # model, whose score it is, or of a classifier, whose probability of label 1
  # it is: a run folder or a ForSequenceClassification folder.
  config.ppo.reward = ""
  config.ppo.max_new_tokens = 128  # at which a response is cut
  config.ppo.temperature = 1.0  # of sampling, above 0
  config.ppo.epochs = 4  # passes over the responses of an iteration
  config.ppo.minibatches = 1  # updates in an epoch; divides batch_size
  config.ppo.clip = 0.2  # of the ratio of probabilities
  config.ppo.value_coef = 0.1  # weight of the value loss
  config.ppo.value_clip = 0.2  # score units; 0: none
  config.ppo.gamma = 1.0  # discount
  config.ppo.lam = 0.95  # weight of longer estimates of the advantage
  config.ppo.kl_coef = 0.05  # score units per nat; at first, with a target
  config.ppo.target_kl = placeholder(float)  # nats of a sequence; None: fixed
  config.ppo.horizon = 10_000.0  # responses in which kl_coef moves by a fifth
  config.ppo.whiten = True  # advantages: mean 0, variance 1 in an iteration
  # Score units that a response loses which did not end in max_new_tokens.
  config.ppo.missing_eos_penalty = 0.0

  config.reference = config_dict.ConfigDict()
  # live: frozen, in the same program; cached: its log-probabilities, computed
  # once and kept in `data.cache_dir`; adapter_off: the base alone, only with
  # lora.rank above 0; ema, sync: as live, and it moves to the policy as in
  # TR-DPO; none. A loss without a reference never traces one.
  config.reference.mode = "live"
  # Empty: the policy as it starts (from lora.path, if given). With adapters,
  # that or a path of others of the same base holds no second copy of it.
  config.reference.path = ""
  # Of its weights. auto: as model.dtype, which changes no bit, as the policy's
  # are rounded to it at each use; norms stay float32.
  config.reference.dtype = "auto"
  # ema: the policy's share in the new reference, in (0, 1]; None: 0.6
  config.reference.alpha = placeholder(float)
  config.reference.every = placeholder(int)  # ema, sync: updates; None: 512

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.name = "rmsprop"  # rmsprop, adamw, adafactor, lion
  config.optimizer.learning_rate = 1e-6
  config.optimizer.schedule = (
    "constant"  # after warm-up: constant, linear, cosine
  )
  config.optimizer.warmup_steps = 150  # updates, linear
  config.optimizer.b1 = placeholder(float)
  config.optimizer.b2 = placeholder(float)  # rmsprop: the decay
  config.optimizer.eps = placeholder(float)
  config.optimizer.weight_decay = placeholder(float)
  config.optimizer.clip = 10.0  # global gradient norm; 0: none

  config.mesh = config_dict.ConfigDict()  # devices; -1: the rest
  config.mesh.data = 1
  config.mesh.fsdp = -1
  config.mesh.tensor = 1
  config.mesh.expert = 1  # splits a model's experts, and rows beside them

  config.checkpoint = config_dict.ConfigDict()
  config.checkpoint.every = 0  # updates; the end is always saved
  # Minutes since the last save, after which there is one besides, so that what
  # kills a run costs no more; 0: none.
  config.checkpoint.minutes = 15.0
  config.checkpoint.keep = 2  # the last ones; the best is kept as well
  # What the best has most of: rewards/accuracies, rewards/margins; or least:
  # loss.
  config.checkpoint.metric = "loss"

  config.eval = config_dict.ConfigDict()
  config.eval.every = 0  # updates; the end is always evaluated
  config.eval.pairs = 0  # of the evaluation file, from its start; 0: all

  config.log = config_dict.ConfigDict()
  config.log.every = 1  # updates
  config.log.wandb_project = ""  # empty: no wandb
  return config
