/* A mixer: how the tokens of a layer exchange what they know. A model has one for each layer, drawn
 * from a few distinct ones. In config.json, on the command line and in messages a mixer is a text
 * of words:
 *
 *   attention (the default) or linear: softmax attention, or linear attention (Katharopoulos et al.
 *                2020), which carries a state of fixed size instead of a cache
 *   recurrence segment=N keep=M   Transformer-XL (Dai et al. 2019): a token sees its segment of N
 *                tokens up to itself and the M tokens before the segment, by relative positions; in
 *                training these M are detached
 *   memory segment=N keep=M top=K   Memorizing Transformers (Wu et al. 2022): attention within the
 *                segment, and over the K keys, of the M tokens before it, that match best; a gate
 *                per head blends the two, the memory is detached
 *   window:256+sinks:4, 0-3=window:64 4-7=causal, ...
 *                what each head may see (ops/visible.h); causal where nothing is said
 *   softcap=X    scores become X tanh(score / X) (Gemma 2)
 *   learned-sinks  a learned logit per head joins the softmax's denominator
 *   no-position  neither RoPE nor ALiBi in this layer (NoPE)
 *   theta=X      RoPE with this base, unscaled, in place of the model's (Gemma 3's local layers)
 *
 * A list of mixers, separated by '/', is a pattern that repeats over the layers:
 * "window:256/window:256/causal". */
#ifndef MODEL_MIXER_H
#define MODEL_MIXER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/error.h"
#include "ops/visible.h"

enum mixer_kind { MIXER_ATTENTION, MIXER_LINEAR, MIXER_RECURRENCE, MIXER_MEMORY };

enum { MIXER_RULES = 200, MIXER_TEXT = MIXER_RULES + 120 };

/* Zeros are plain causal attention. */
struct mixer_config {
    enum mixer_kind kind;
    bool no_position, learned_sinks;
    float softcap;    /* 0: none */
    float rope_theta; /* 0: the model's RoPE */
    /* Of recurrence and memory; 0 in the others. */
    int32_t segment, keep, top;
    char rules[MIXER_RULES];
};

/* A text without '/', of one word at least. ERR_ARGUMENT names the word that is wrong. */
tril_status mixer_parse(struct mixer_config *m, const char *text, struct tril_error *err);
/* Writes the text ("causal" for plain attention) into MIXER_TEXT characters and returns it. */
char *mixer_print(const struct mixer_config *m, char *text);
bool mixer_equal(const struct mixer_config *a, const struct mixer_config *b);
/* Whether the combination makes sense and the rules fit `heads` heads and hide the future. */
tril_status mixer_check(const struct mixer_config *m, int64_t heads, struct tril_error *err);
/* Whether the layer rotates q and k where the model's positions are RoPE. */
static inline bool mixer_rotates(const struct mixer_config *m) {
    return !m->no_position && m->kind != MIXER_RECURRENCE;
}
/* Whether it needs more than its own batch: hidden states or keys of earlier segments. */
static inline bool mixer_recalls(const struct mixer_config *m) {
    return m->kind == MIXER_RECURRENCE || m->kind == MIXER_MEMORY;
}
/* How far back the layer's queries see: position p sees no keys but those below *first and those
 * above p - *reach. False: there is no such bound. */
bool mixer_reach(const struct mixer_config *m, int64_t heads, int64_t *first, int64_t *reach);
/* The rules of all heads; *set zero-initialised, to be freed by the caller in every case. */
tril_status mixer_rules(const struct mixer_config *m, int64_t heads, struct visible_set *set,
                        struct tril_error *err);

#endif
