/* Appends of a fixed size, as fast as write(2) goes: what a log writer does, without an interpreter's time in between.
 *
 *   appender FILE SIZE COUNT every|last     fsync after every append, or once after the last
 *
 * Opens O_WRONLY|O_APPEND|O_CREAT. Prints the seconds from the first append to the end of the last fsync. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    long size = atol(argv[2]), count = atol(argv[3]);
    int every = strcmp(argv[4], "every") == 0;
    char *line = malloc(size);
    int fd = open(argv[1], O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (fd < 0 || line == NULL) { perror(argv[1]); return 1; }
    memset(line, 'x', size);
    line[size - 1] = '\n';
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (long i = 0; i < count; i++) {
        if (write(fd, line, size) != size) { perror("write"); return 1; }
        if (every && fsync(fd) != 0) { perror("fsync"); return 1; }
    }
    if (!every && fsync(fd) != 0) { perror("fsync"); return 1; }
    clock_gettime(CLOCK_MONOTONIC, &end);
    if (close(fd) != 0) { perror("close"); return 1; }
    printf("%.9f\n", (end.tv_sec - begin.tv_sec) + (end.tv_nsec - begin.tv_nsec) * 1e-9);
    return 0;
}
