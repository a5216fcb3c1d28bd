/* A token shard: the bytes as a file; and with header and body taken apart (the first 96 bytes are
 * the header's fields, the rest lies at 4096) and both hashes made right, as a forger would. It is
 * refused in one sentence, or everything that it promises holds. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "text/shard_file.h"
#include "text/tokenizer_impl.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(bool good) {
    if (!good)
        abort();
}

static void check_shard(const unsigned char *file, size_t size) {
    struct shard s = {0};
    struct tril_error err = {.message = ""};
    tril_status st = shard_check(&s, file, size, "fuzz", &err);
    if (st != TRIL_OK) {
        check(err.code == st && err.message[0] && !strchr(err.message, '\n'));
        check(shard_check(&s, file, size, "fuzz", NULL) == st);
        return;
    }
    const struct shard_header *h = &s.header;
    uint64_t sum = 0;
    check((const unsigned char *)(s.documents + h->document_count + 1) == file + size);
    for (uint64_t i = 0; i < h->token_count; i++) {
        check(shard_token(&s, i) < h->vocab_size);
        sum += shard_token(&s, i);
    }
    for (uint64_t i = 0; i < h->document_count; i++)
        check(s.documents[i].token < s.documents[i + 1].token &&
              s.documents[i].byte <= s.documents[i + 1].byte);
    check(s.documents[h->document_count].token == h->token_count);
    static volatile uint64_t sink;
    sink = sum;
    (void)sink;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    check_shard(data, size);
    if (size < sizeof(struct shard_header) || size > 60000)
        return 0;
    size_t body = size - sizeof(struct shard_header);
    unsigned char *file = calloc(1, SHARD_DATA_OFFSET + body);
    struct shard_header h;
    memcpy(&h, data, sizeof h);
    memcpy(h.magic, SHARD_MAGIC, sizeof h.magic);
    h.version = SHARD_VERSION;
    memcpy(file + SHARD_DATA_OFFSET, data + sizeof h, body);
    h.data_hash = body ? hash_bytes(file + SHARD_DATA_OFFSET, body, 0) : 0;
    h.header_hash = hash_bytes(&h, offsetof(struct shard_header, header_hash), 0);
    memcpy(file, &h, sizeof h);
    check_shard(file, SHARD_DATA_OFFSET + body);
    free(file);
    return 0;
}
