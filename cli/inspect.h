/* What tril inspect shows through commands of its own. */
#ifndef CLI_INSPECT_H
#define CLI_INSPECT_H

int cmd_inspect_attention(int argc, char **argv);
int cmd_inspect_smoothing(int argc, char **argv);

#endif
