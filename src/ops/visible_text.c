/* Visibility rules from text, and who owns what they point to. */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "base/memory.h"
#include "ops/visible.h"

struct word {
    const char *text;
    enum visible_kind kind;
    int numbers; /* -1: a list */
};

static const struct word words[] = {
    {"window", VISIBLE_WINDOW, 1},   {"sinks", VISIBLE_SINKS, 1},
    {"global", VISIBLE_GLOBAL, -1},  {"dilated", VISIBLE_DILATED, 2},
    {"strided", VISIBLE_STRIDED, 1}, {"fixed", VISIBLE_FIXED, 2},
    {"chunk", VISIBLE_CHUNK, 1},     {"blocks", VISIBLE_BLOCKS, 0},
};

enum { WORDS = sizeof words / sizeof *words };

/* Digits at *at; false if there are none or too many. */
static bool read_number(const char **at, int64_t *out) {
    const char *s = *at;
    int64_t n = 0;
    if (!isdigit((unsigned char)*s))
        return false;
    for (; isdigit((unsigned char)*s); s++) {
        n = n * 10 + (*s - '0');
        if (n > INT32_MAX)
            return false;
    }
    *at = s;
    *out = n;
    return true;
}

static bool at_end(const char *at) {
    return *at == '+' || *at == 0 || isspace((unsigned char)*at);
}

static int compare_positions(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* Positions separated by commas, sorted, each once. */
static tril_status read_list(const char **at, struct visible_part *part, struct tril_error *err) {
    size_t most = 1;
    for (const char *s = *at; !at_end(s); s++)
        most += *s == ',';
    void *memory;
    tril_status st = mem_alloc(&memory, most * sizeof(int32_t), "a list of positions", err);
    if (st != TRIL_OK)
        return st;
    int32_t *list = memory;
    int64_t count = 0, x;
    for (;;) {
        if (!read_number(at, &x)) {
            mem_free(list);
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "global: takes positions from 0 to 2^31 - 1 separated by commas, not "
                             "\"%.40s\"",
                             *at);
        }
        list[count++] = (int32_t)x;
        if (**at != ',')
            break;
        ++*at;
    }
    qsort(list, (size_t)count, sizeof *list, compare_positions);
    int64_t kept = 0;
    for (int64_t k = 0; k < count; k++)
        if (kept == 0 || list[kept - 1] != list[k])
            list[kept++] = list[k];
    part->a = kept;
    part->list = list;
    return TRIL_OK;
}

static tril_status read_part(const char **at, struct visible_rule *rule, struct tril_error *err) {
    size_t length = strcspn(*at, ":+ \t\r\n");
    const struct word *w = words;
    for (; w < words + WORDS; w++)
        if (strlen(w->text) == length && memcmp(w->text, *at, length) == 0)
            break;
    if (w == words + WORDS)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "\"%.*s\" is no visibility rule; there are causal, full, window:N, "
                         "sinks:N, global:a,b, dilated:N,s, strided:L, fixed:L,C, chunk:N, blocks",
                         (int)(length < 40 ? length : 40), *at);
    if (rule->parts == VISIBLE_MOST_PARTS)
        return error_set(err, TRIL_ERR_ARGUMENT, "a visibility rule has more than %d parts",
                         VISIBLE_MOST_PARTS);
    struct visible_part part = {.kind = w->kind};
    const char *begin = *at;
    *at += length;
    if (w->numbers != 0 && *(*at)++ != ':')
        return error_set(err, TRIL_ERR_ARGUMENT, "the visibility rule %s needs a ':' and %s",
                         w->text, w->numbers == 2 ? "two numbers" : "a number");
    bool good = true;
    if (w->numbers < 0) {
        tril_status st = read_list(at, &part, err);
        if (st != TRIL_OK)
            return st;
    } else if (w->numbers > 0) {
        good = read_number(at, &part.a);
        if (good && w->numbers == 2)
            good = *(*at)++ == ',' && read_number(at, &part.b);
    }
    rule->part[rule->parts++] = part; /* the set owns its list from now on */
    if (!good || !at_end(*at))
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "\"%.40s\": the visibility rule %s takes %s below 2^31", begin, w->text,
                         w->numbers == 0   ? "no number"
                         : w->numbers == 2 ? "two numbers, separated by a comma,"
                         : w->numbers == 1 ? "one number"
                                           : "numbers separated by commas");
    struct visible_rule alone = {.parts = 1, .part = {part}};
    return w->kind == VISIBLE_BLOCKS ? TRIL_OK : visible_check(&alone, 0, 0, "--visible", err);
}

static bool read_word(const char **at, const char *word) {
    size_t length = strlen(word);
    if (strncmp(*at, word, length) != 0 || !at_end(*at + length))
        return false;
    *at += length;
    return true;
}

static tril_status read_rule(const char **at, struct visible_rule *rule, struct tril_error *err) {
    int causal = 0, full = 0;
    for (;;) {
        if (read_word(at, "causal"))
            causal++;
        else if (read_word(at, "full"))
            full++;
        else {
            tril_status st = read_part(at, rule, err);
            if (st != TRIL_OK)
                return st;
        }
        if (**at != '+')
            break;
        ++*at;
    }
    rule->causal = !full;
    if (causal + full > 1)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "a visibility rule is either causal or full, said once");
    return TRIL_OK;
}

/* "0-3=" or "5="; nothing: all heads. */
static tril_status read_heads(const char **at, struct visible_heads *heads,
                              struct tril_error *err) {
    const char *s = *at;
    *heads = (struct visible_heads){0, -1};
    if (!isdigit((unsigned char)*s))
        return TRIL_OK;
    bool good = read_number(&s, &heads->first);
    heads->last = heads->first;
    if (good && *s == '-') {
        s++;
        good = read_number(&s, &heads->last);
    }
    if (!good || *s != '=' || heads->last < heads->first)
        return error_set(err, TRIL_ERR_ARGUMENT,
                         "\"%.40s\": a rule for some heads is written 0-3=RULE or 5=RULE", *at);
    *at = s + 1;
    return TRIL_OK;
}

tril_status visible_parse(const char *text, struct visible_set *set, struct tril_error *err) {
    tril_status st = TRIL_OK;
    const char *at = text;
    bool some = false;
    if (!set->rules) {
        void *memory;
        TRY(mem_alloc_zero(&memory, VISIBLE_MOST_RULES * sizeof *set->rules, "visibility rules",
                           err));
        set->rules = memory;
        TRY(mem_alloc_zero(&memory, VISIBLE_MOST_RULES * sizeof *set->heads, "visibility rules",
                           err));
        set->heads = memory;
    }
    for (;; some = true) {
        while (isspace((unsigned char)*at))
            at++;
        if (!*at)
            break;
        if (set->rule_count == VISIBLE_MOST_RULES)
            return error_set(err, TRIL_ERR_ARGUMENT, "there are more than %d visibility rules",
                             VISIBLE_MOST_RULES);
        int32_t index = set->rule_count++; /* what it owns is freed even when it is malformed */
        TRY(read_heads(&at, &set->heads[index], err));
        TRY(read_rule(&at, &set->rules[index], err));
        if (*at && !isspace((unsigned char)*at))
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "\"%.40s\" follows a visibility rule; parts are joined by '+'", at);
    }
    if (!some)
        st = error_set(err, TRIL_ERR_ARGUMENT,
                       "the visibility rule is empty; write causal or full, say");
done:
    return st;
}

tril_status visible_set_heads(struct visible_set *set, int64_t heads, struct tril_error *err) {
    enum { NONE = 255 };
    if (set->rule_count == 0) {
        tril_status st = visible_parse("causal", set, err);
        if (st != TRIL_OK)
            return st;
    }
    mem_free(set->head_rule);
    set->head_rule = NULL;
    void *memory;
    tril_status st = mem_alloc(&memory, (size_t)(heads > 0 ? heads : 0), "the rules of heads", err);
    if (st != TRIL_OK)
        return st;
    set->head_rule = memory;
    memset(memory, NONE, (size_t)(heads > 0 ? heads : 0));
    for (int32_t k = 0; k < set->rule_count; k++) {
        int64_t first = set->heads[k].first, last = set->heads[k].last;
        if (last < 0)
            last = heads - 1;
        if (last >= heads)
            return error_set(err, TRIL_ERR_ARGUMENT,
                             "a visibility rule is given for head %lld, but there are %lld heads",
                             (long long)last, (long long)heads);
        for (int64_t h = first; h <= last; h++) {
            if (set->head_rule[h] != NONE)
                return error_set(err, TRIL_ERR_ARGUMENT,
                                 "head %lld has been given two visibility rules; join parts by "
                                 "'+', or give each head one rule",
                                 (long long)h);
            set->head_rule[h] = (uint8_t)k;
        }
    }
    for (int64_t h = 0; h < heads; h++)
        if (set->head_rule[h] == NONE)
            return error_set(err, TRIL_ERR_ARGUMENT, "head %lld has no visibility rule",
                             (long long)h);
    return TRIL_OK;
}

bool visible_set_wants_blocks(const struct visible_set *set) {
    for (int32_t k = 0; k < set->rule_count; k++)
        for (int part = 0; part < set->rules[k].parts; part++)
            if (set->rules[k].part[part].kind == VISIBLE_BLOCKS)
                return true;
    return false;
}

void visible_set_blocks(struct visible_set *set, const uint8_t *blocks, int64_t block_rows,
                        int64_t block_columns, int64_t block_q, int64_t block_k) {
    for (int32_t k = 0; k < set->rule_count; k++) {
        struct visible_rule *rule = &set->rules[k];
        rule->blocks = blocks;
        rule->block_rows = block_rows;
        rule->block_columns = block_columns;
        rule->block_q = block_q;
        rule->block_k = block_k;
    }
}

void visible_set_free(struct visible_set *set) {
    if (!set)
        return;
    for (int32_t k = 0; k < set->rule_count; k++)
        for (int part = 0; part < set->rules[k].parts; part++)
            mem_free((void *)(uintptr_t)set->rules[k].part[part].list);
    mem_free(set->rules);
    mem_free(set->heads);
    mem_free(set->head_rule);
    *set = (struct visible_set){0};
}
