"""Words of other libraries and of papers' code, and our word for each; the hints in messages come from here."""

from __future__ import annotations

# Names of arguments.
SYNONYMS = {
    **dict.fromkeys(("epsilon", "epsilons", "radius", "max_eps"), "eps"),
    **dict.fromkeys(("step_size", "eps_iter", "eps_step", "rel_stepsize", "stepsize"), "alpha"),
    **dict.fromkeys(("abs_stepsize", "step"), "alpha"),
    **dict.fromkeys(("num_steps", "n_iter", "nb_iter", "iterations", "max_iter", "iters"), "steps"),
    **dict.fromkeys(("perturb_steps", "attack_iters", "num_iter", "niter", "n_iters"), "steps"),
    **dict.fromkeys(("rand_init", "random_init", "rand", "random", "rs"), "random_start"),
    **dict.fromkeys(("n_restarts", "num_restarts", "num_random_init"), "restarts"),
    **dict.fromkeys(("clip_min", "clip_max", "clip_values", "box", "image_range"), "bounds"),
    **dict.fromkeys(("loss_fn", "criterion", "loss_type"), "loss"),
    **dict.fromkeys(("ord", "order", "p", "Lp", "distance", "threat_model"), "norm"),
    **dict.fromkeys(("mu", "decay_factor", "momentum_decay"), "decay"),
    **dict.fromkeys(("confidence", "conf"), "kappa"),
    **dict.fromkeys(("initial_const", "const"), "c"),
    **dict.fromkeys(("learning_rate", "step_lr"), "lr"),
    **dict.fromkeys(("binary_search_steps", "binary_steps"), "search_steps"),
    **dict.fromkeys(("n_target_classes", "num_target_classes"), "target_classes"),
    **dict.fromkeys(("n_queries", "num_queries", "max_queries"), "queries"),
    **dict.fromkeys(("dtype", "amp", "autocast"), "precision"),
    **dict.fromkeys(("net", "network", "classifier", "fmodel", "predict"), "model"),
    **dict.fromkeys(("images", "image", "inputs", "x_natural", "imgs"), "x"),
    **dict.fromkeys(("labels", "label", "target", "targets"), "y"),
    **dict.fromkeys(("max_images", "n_examples", "num_examples", "n_ex"), "max_examples"),
    **dict.fromkeys(("attacks_to_run", "attack_list"), "version"),
    **dict.fromkeys(("dataset", "dataloader", "loader"), "data"),
    **dict.fromkeys(("data_dir", "data_path"), "root"),
    **dict.fromkeys(("gpu", "cuda"), "device"),
}

# Words that an argument may have.
WORDS = {
    **dict.fromkeys(("cross_entropy", "crossentropy", "crossentropyloss", "xent"), "ce"),
    **dict.fromkeys(("margin", "cw_loss"), "cw"),
    **dict.fromkeys(("kl_div", "kldiv", "kldivloss"), "kl"),
    "dlr_targeted": "dlr-t",
    **dict.fromkeys(("float32", "float", "full", "no"), "fp32"),
    **dict.fromkeys(("float16", "half"), "fp16"),
    **dict.fromkeys(("bfloat16", "amp"), "bf16"),
    **dict.fromkeys(("cosine", "cos"), "angular"),
    **dict.fromkeys(("zeros", "zero"), "constant"),
}
