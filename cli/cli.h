/* The sub-commands: one function and one file each. argv[0] is the sub-command's name; the result
 * is the process's exit code (0, or tril_status_exit_code of what failed). */
#ifndef CLI_CLI_H
#define CLI_CLI_H

#define COMMAND_LIST(X)                                                                            \
    X(train, "train a model on text, from scratch or from existing weights")                       \
    X(eval, "loss, perplexity and bits per byte of a model on a text; logits and gradients")       \
    X(generate, "continue a text")                                                                 \
    X(tokenizer, "train a tokenizer; text to ids and back")                                        \
    X(export, "write a model in another dtype or with other settings")                             \
    X(inspect, "look inside a model: attention, weights, shapes, parameters, memory, smoothing")   \
    X(attention, "attention on tensors of your own, forward and backward; pictures of masks")      \
    X(bench, "measure training, prefill, decoding, attention and matrix products on this machine") \
    X(lab, "the papers' experiments: tables beside the published figures, plots, findings")        \
    X(plot, "curves from a table of numbers (CSV to SVG)")                                         \
    X(version, "what this build found: instruction sets, libraries")

#define COMMAND_DECLARE(name, text) int cmd_##name(int argc, char **argv);
COMMAND_LIST(COMMAND_DECLARE)
#undef COMMAND_DECLARE

#endif
