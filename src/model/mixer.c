/* Mixers from text and to text. */
#include "model/mixer.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static tril_status wrong(struct tril_error *err, const char *word, int length, const char *why) {
    return error_set(err, TRIL_ERR_ARGUMENT, "mixer: \"%.*s\" %s", length > 60 ? 60 : length, word,
                     why);
}

/* A positive number after "name=". */
static tril_status number_read(const char *word, int length, const char *name, float *out,
                               struct tril_error *err) {
    char *end;
    double x = strtod(word + strlen(name), &end);
    if (end != word + length || !(x > 0 && x < 1e30))
        return wrong(err, word, length, "needs a number above 0 after the =");
    *out = (float)x;
    return TRIL_OK;
}

/* A whole number after "name=". */
static tril_status count_read(const char *word, int length, const char *name, int32_t *out,
                              struct tril_error *err) {
    char *end;
    long long x = strtoll(word + strlen(name), &end, 10);
    if (end != word + length || x < 1 || x > 1 << 30)
        return wrong(err, word, length, "needs a whole number from 1 to 2^30 after the =");
    *out = (int32_t)x;
    return TRIL_OK;
}

/* Appends a rule's word to m->rules. */
static tril_status rule_add(struct mixer_config *m, const char *word, int length,
                            struct tril_error *err) {
    size_t used = strlen(m->rules);
    if (used + (size_t)length + 2 > MIXER_RULES)
        return wrong(err, word, length, "is too much: the rules of a mixer have 199 characters");
    snprintf(m->rules + used, MIXER_RULES - used, "%s%.*s", used ? " " : "", length, word);
    return TRIL_OK;
}

static tril_status word_read(struct mixer_config *m, const char *word, int n,
                             struct tril_error *err) {
#define IS(text) (n == (int)strlen(text) && strncmp(word, text, (size_t)n) == 0)
#define BEGINS(text) (n > (int)strlen(text) && strncmp(word, text, strlen(text)) == 0)
    if (IS("attention"))
        m->kind = MIXER_ATTENTION;
    else if (IS("linear"))
        m->kind = MIXER_LINEAR;
    else if (IS("recurrence"))
        m->kind = MIXER_RECURRENCE;
    else if (IS("memory"))
        m->kind = MIXER_MEMORY;
    else if (BEGINS("segment="))
        return count_read(word, n, "segment=", &m->segment, err);
    else if (BEGINS("keep="))
        return count_read(word, n, "keep=", &m->keep, err);
    else if (BEGINS("top="))
        return count_read(word, n, "top=", &m->top, err);
    else if (IS("learned-sinks"))
        m->learned_sinks = true;
    else if (IS("no-position"))
        m->no_position = true;
    else if (BEGINS("softcap="))
        return number_read(word, n, "softcap=", &m->softcap, err);
    else if (BEGINS("theta="))
        return number_read(word, n, "theta=", &m->rope_theta, err);
    else if (!IS("causal"))
        return rule_add(m, word, n, err);
    return TRIL_OK;
#undef IS
#undef BEGINS
}

tril_status mixer_parse(struct mixer_config *m, const char *text, struct tril_error *err) {
    tril_status st = TRIL_OK;
    struct mixer_config n = {0};
    struct visible_set set = {0};
    if (text[strspn(text, " \t\n\v\f\r")] == '\0')
        TRY(error_set(err, TRIL_ERR_ARGUMENT,
                      "some of the mixers are empty; \"causal\" is the usual attention"));
    if (strchr(text, '/'))
        TRY(wrong(err, text, (int)strlen(text), "holds a '/', which separates mixers"));
    for (const char *s = text; *s;) {
        while (isspace((unsigned char)*s))
            s++;
        const char *end = s;
        while (*end && !isspace((unsigned char)*end))
            end++;
        if (end > s)
            TRY(word_read(&n, s, (int)(end - s), err));
        s = end;
    }
    if (mixer_recalls(&n)) {
        n.segment = n.segment ? n.segment : 128;
        n.keep = n.keep ? n.keep : n.kind == MIXER_MEMORY ? 8192 : n.segment;
        n.top = n.top || n.kind == MIXER_RECURRENCE ? n.top : 32;
    }
    if (n.rules[0]) {
        st = visible_parse(n.rules, &set, err);
        if (st != TRIL_OK) {
            error_prefix(err, "mixer \"%.60s\"", text);
            goto done;
        }
    }
    *m = n;
done:
    visible_set_free(&set);
    return st;
}

/* " name=x", x as the shortest text that reads back the same. */
static void number_print(char *text, const char *name, float x) {
    size_t used = strlen(text);
    for (int digits = 1; x > 0 && digits <= 9; digits++) {
        snprintf(text + used, MIXER_TEXT - used, " %s=%.*g", name, digits, (double)x);
        if (strtof(text + used + strlen(name) + 2, NULL) == x)
            return;
    }
}

char *mixer_print(const struct mixer_config *m, char *text) {
    static const char *const kinds[] = {"", "linear", "recurrence", "memory"};
    text[0] = 0;
    if (m->kind != MIXER_ATTENTION)
        snprintf(text, MIXER_TEXT, " %s", kinds[m->kind]);
    else
        snprintf(text, MIXER_TEXT, " %s", m->rules[0] ? m->rules : "causal");
    size_t used = strlen(text);
    if (mixer_recalls(m))
        used += (size_t)snprintf(text + used, MIXER_TEXT - used, " segment=%d keep=%d",
                                 (int)m->segment, (int)m->keep);
    if (m->kind == MIXER_MEMORY)
        snprintf(text + used, MIXER_TEXT - used, " top=%d", (int)m->top);
    if (m->learned_sinks)
        strcat(text, " learned-sinks");
    if (m->no_position)
        strcat(text, " no-position");
    number_print(text, "softcap", m->softcap);
    number_print(text, "theta", m->rope_theta);
    memmove(text, text + 1, strlen(text));
    return text;
}

bool mixer_equal(const struct mixer_config *a, const struct mixer_config *b) {
    return a->kind == b->kind && a->no_position == b->no_position &&
           a->learned_sinks == b->learned_sinks && a->softcap == b->softcap &&
           a->rope_theta == b->rope_theta && a->segment == b->segment && a->keep == b->keep &&
           a->top == b->top && strcmp(a->rules, b->rules) == 0;
}

tril_status mixer_rules(const struct mixer_config *m, int64_t heads, struct visible_set *set,
                        struct tril_error *err) {
    tril_status st = TRIL_OK;
    char chunk[32];
    if (m->kind == MIXER_MEMORY) {
        snprintf(chunk, sizeof chunk, "chunk:%d", (int)m->segment);
        TRY(visible_parse(chunk, set, err));
    } else if (m->rules[0])
        TRY(visible_parse(m->rules, set, err));
    TRY(visible_set_heads(set, heads, err));
done:
    return st;
}

/* Widens [*first, *reach] by what a rule shows; false: it has no bound. */
static bool rule_reach(const struct visible_rule *rule, int64_t *first, int64_t *reach) {
    for (int32_t i = 0; i < rule->parts; i++) {
        const struct visible_part *p = &rule->part[i];
        int64_t back = 0;
        if (p->kind == VISIBLE_SINKS)
            *first = p->a > *first ? p->a : *first;
        else if (p->kind == VISIBLE_WINDOW || p->kind == VISIBLE_CHUNK)
            back = p->a;
        else if (p->kind == VISIBLE_DILATED)
            back = (p->a - 1) * p->b + 1;
        else
            return false;
        *reach = back > *reach ? back : *reach;
    }
    return rule->parts > 0;
}

bool mixer_reach(const struct mixer_config *m, int64_t heads, int64_t *first, int64_t *reach) {
    struct visible_set set = {0};
    *first = *reach = 0;
    if (mixer_recalls(
            m)) { /* a recurrence forgets whole segments, so that its own keep their place */
        int64_t keep = m->keep, segment = m->segment;
        if (m->kind == MIXER_RECURRENCE)
            keep = (keep + segment - 1) / segment * segment;
        *reach = keep + segment;
        return true;
    }
    bool bounded =
        m->kind == MIXER_ATTENTION && m->rules[0] && mixer_rules(m, heads, &set, NULL) == TRIL_OK;
    for (int32_t i = 0; bounded && i < set.rule_count; i++)
        bounded = rule_reach(&set.rules[i], first, reach);
    visible_set_free(&set);
    return bounded;
}

tril_status mixer_check(const struct mixer_config *m, int64_t heads, struct tril_error *err) {
    tril_status st;
    struct visible_set set = {0};
    char text[MIXER_TEXT];
    const char *why = NULL;
    TRY(mixer_rules(m, heads, &set, err));
    bool future = false;
    for (int32_t i = 0; i < set.rule_count; i++)
        future |= !set.rules[i].causal;
    if ((unsigned)m->kind > MIXER_MEMORY)
        why = "is of an unknown kind";
    else if (future)
        why = "shows tokens their own future, which a causal language model must not see";
    else if (visible_set_wants_blocks(&set))
        why = "needs a list of blocks, which a configuration has no place for";
    else if (m->kind == MIXER_LINEAR && (m->rules[0] || m->softcap > 0 || m->learned_sinks))
        why = "is linear attention: it has no scores, so no rules, softcap or sinks";
    else if (mixer_recalls(m) && m->rules[0])
        why = "recalls what came before its segment: it takes no other rules";
    else if (m->kind == MIXER_RECURRENCE &&
             (m->softcap > 0 || m->learned_sinks || m->rope_theta > 0 || m->no_position))
        why = "is recurrent, with positions of its own: it takes no softcap, sinks or theta";
    else if (mixer_recalls(m) ? m->segment < 1 || m->keep < 1 : m->segment || m->keep)
        why = "needs segment=N and keep=N, which other mixers than recurrence and memory have not";
    else if (m->kind == MIXER_MEMORY ? m->top < 1 || m->top > 1024 : m->top != 0)
        why = "needs top=N from 1 to 1024, which other mixers than memory have not";
    else if (!(m->softcap >= 0 && isfinite(m->softcap)) ||
             (m->rope_theta != 0 && !(m->rope_theta > 1 && m->rope_theta <= 1e15f)))
        why = "has a softcap or theta that is out of range";
    if (why) {
        mixer_print(m, text);
        st = wrong(err, text, (int)strlen(text), why);
    }
done:
    visible_set_free(&set);
    return st;
}
