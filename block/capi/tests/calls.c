// Every function, and what each refuses. The arguments are an image and a data file that are not there.

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tandem.h>

#define MIB (1ull << 20)

static tandem_error error;

#define CHECK(what) ((what) ? (void)0 : fail(__LINE__, #what))
// The call ends with `wanted`, the structure says so as well, and the message has `words` in it.
#define ENDS(call, wanted, words)                                                                  \
    do {                                                                                           \
        tandem_status status = (call);                                                             \
        if (status != (wanted) || error.status != status || !strstr(error.message, words))         \
            fail(__LINE__, #call);                                                                 \
    } while (0)
#define DONE(call) ENDS(call, TANDEM_STATUS_OK, "")
#define BAD(call, words) ENDS(call, TANDEM_STATUS_INVALID_ARGUMENT, words)

static void fail(int line, const char *what)
{
    printf("line %d: %s: status %d, errno %d: %s\n", line, what, error.status, error.os_error,
           error.message);
    exit(1);
}

static void bad_arguments(const char *image)
{
    tandem_create_options create;
    tandem_open_options open;
    tandem_disk *disk = (tandem_disk *)&open;
    tandem_info info;
    char byte = 0;

    BAD(tandem_create(NULL, MIB, NULL, &error), "path is NULL");
    BAD(tandem_create("", MIB, NULL, &error), "path is empty");
    memset(&create, 0, sizeof create);
    create.flags = 0x80;
    BAD(tandem_create(image, MIB, &create, &error), "flags is 0x80");
    create.flags = 0;
    create.reserved[3] = 7;
    BAD(tandem_create(image, MIB, &create, &error), "reserved holds 0x7");
    create.reserved[3] = 0;
    create.reserved32 = 1;
    BAD(tandem_create(image, MIB, &create, &error), "0x1");
    create.reserved32 = 0;
    create.format = 9;
    BAD(tandem_create(image, MIB, &create, &error), "format is 9");
    create.format = TANDEM_FORMAT_RAW;
    create.cluster_size = 4096;
    BAD(tandem_create(image, MIB, &create, &error), "raw");
    create.format = TANDEM_FORMAT_QCOW2;
    create.backing_format = 9;
    BAD(tandem_create(image, MIB, &create, &error), "backing_format is 9");
    create.backing_format = 0;
    create.cluster_size = 1000;
    ENDS(tandem_create(image, MIB, &create, &error), TANDEM_STATUS_OPTION, "Cluster size");

    ENDS(tandem_open(image, NULL, &disk, &error), TANDEM_STATUS_IO, image);
    CHECK(disk == NULL && error.os_error == ENOENT);
    BAD(tandem_open(image, NULL, NULL, &error), "disk is NULL");
    memset(&open, 0, sizeof open);
    open.flags = 0x800;
    BAD(tandem_open(image, &open, &disk, &error), "flags is 0x800");
    open.flags = TANDEM_OPEN_FOLLOW_ANYWHERE | TANDEM_OPEN_FOLLOW_NOTHING;
    BAD(tandem_open(image, &open, &disk, &error), "follow");
    open.flags = 0;
    open.format = 3;
    BAD(tandem_open(image, &open, &disk, &error), "format is 3");
    open.format = TANDEM_FORMAT_RAW;
    open.data_file = image;
    BAD(tandem_open(image, &open, &disk, &error), "raw");

    BAD(tandem_read(NULL, &byte, 1, 0, &error), "disk is NULL");
    BAD(tandem_get_info(NULL, &info, &error), "disk is NULL");
    CHECK(tandem_flush(NULL, NULL) == TANDEM_STATUS_INVALID_ARGUMENT);
    DONE(tandem_close(NULL, &error));
}

static void whole_life(const char *image, const char *data)
{
    tandem_create_options create;
    tandem_open_options open;
    tandem_disk *disk, *other;
    tandem_info info;
    char block[4096], zeros[4096];

    memset(zeros, 0, sizeof zeros);
    memset(block, 'x', sizeof block);
    memset(&create, 0, sizeof create);
    create.cluster_size = 4096;
    create.data_file = data;
    DONE(tandem_create(image, 8 * MIB, &create, &error));
    DONE(tandem_open(image, NULL, &disk, &error));
    ENDS(tandem_open(image, NULL, &other, &error), TANDEM_STATUS_LOCKED, "lock");
    CHECK(other == NULL);

    DONE(tandem_get_info(disk, &info, &error));
    CHECK(info.size == 8 * MIB && info.cluster_size == 4096 && info.format == TANDEM_FORMAT_QCOW2);
    CHECK(!info.read_only && info.write_cache && info.discard_granularity == 4096);
    BAD(tandem_get_info(disk, NULL, &error), "info is NULL");

    DONE(tandem_write(disk, block, sizeof block, 5000, &error));
    DONE(tandem_write(disk, NULL, 0, 0, &error));
    BAD(tandem_write(disk, NULL, 1, 0, &error), "buffer is NULL");
    BAD(tandem_read(disk, block, SIZE_MAX, 0, &error), "len is");
    ENDS(tandem_write(disk, block, 2, 8 * MIB - 1, &error), TANDEM_STATUS_OUT_OF_RANGE, "8388607");
    ENDS(tandem_discard(disk, UINT64_MAX, 2, &error), TANDEM_STATUS_OUT_OF_RANGE, "outside");
    DONE(tandem_flush(disk, &error));
    memset(block, 0, sizeof block);
    DONE(tandem_read(disk, block, sizeof block, 5000, &error));
    CHECK(block[0] == 'x' && block[4095] == 'x');
    DONE(tandem_write_zeroes(disk, 5000, 1000, false, &error));
    DONE(tandem_discard(disk, 8192, 4096, &error));
    DONE(tandem_read(disk, block, sizeof block, 5000, &error));
    CHECK(block[999] == 0 && block[1000] == 'x');
    DONE(tandem_resize(disk, 16 * MIB, &error));
    DONE(tandem_read(disk, block, sizeof block, 16 * MIB - 4096, &error));
    CHECK(memcmp(block, zeros, sizeof block) == 0);
    memset(block, 'y', sizeof block);
    DONE(tandem_write(disk, block, sizeof block, 16 * MIB - 4096, &error));
    DONE(tandem_close(disk, &error));

    memset(&open, 0, sizeof open);
    open.flags = TANDEM_OPEN_READ_ONLY | TANDEM_OPEN_WRITE_THROUGH;
    DONE(tandem_open(image, &open, &disk, &error));
    DONE(tandem_get_info(disk, &info, &error));
    CHECK(info.size == 16 * MIB && info.read_only && !info.write_cache);
    ENDS(tandem_write(disk, block, 1, 0, &error), TANDEM_STATUS_READ_ONLY, "read-only");
    DONE(tandem_close(disk, &error));

    open.format = TANDEM_FORMAT_RAW;
    DONE(tandem_open(data, &open, &disk, &error));
    DONE(tandem_read(disk, block, sizeof block, 16 * MIB - 4096, &error));
    CHECK(block[0] == 'y' && block[4095] == 'y');
    DONE(tandem_close(disk, &error));
    open.format = TANDEM_FORMAT_QCOW2;
    ENDS(tandem_open(data, &open, &disk, &error), TANDEM_STATUS_NOT_QCOW2, data);
    open.flags = TANDEM_OPEN_FOLLOW_NOTHING;
    ENDS(tandem_open(image, &open, &disk, &error), TANDEM_STATUS_DATA_FILE, "follow");
    open.data_file = data;
    DONE(tandem_open(image, &open, &disk, &error));
    DONE(tandem_close(disk, &error));
}

int main(int count, char **names)
{
    CHECK(count == 3 && strlen(tandem_version()) >= 5);
    bad_arguments(names[1]);
    whole_life(names[1], names[2]);
    printf("all calls are right\n");
    return 0;
}
