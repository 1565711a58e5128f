// Makes a disk whose data is a raw file beside the image, and has four threads write to it.
//
//     cc -pthread disk.c -ltandem && ./a.out disk.qcow2 disk.raw

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <tandem.h>

enum { PART = 1 << 20, THREADS = 4 };

struct writer {
    pthread_t thread;
    tandem_disk *disk;
    unsigned char number;
};

static void *write_part(void *argument)
{
    struct writer *writer = argument;
    unsigned char block[65536];
    tandem_error error;

    memset(block, writer->number, sizeof block);
    for (uint64_t offset = 0; offset < PART; offset += sizeof block) {
        uint64_t place = (uint64_t)writer->number * PART + offset;
        if (tandem_write(writer->disk, block, sizeof block, place, &error)) {
            fprintf(stderr, "%s\n", error.message);
            return "failed";
        }
    }
    return NULL;
}

int main(int count, char **names)
{
    tandem_create_options options = {.flags = TANDEM_CREATE_DATA_FILE_RAW};
    struct writer writers[THREADS];
    unsigned char byte = 0;
    tandem_disk *disk;
    tandem_error error;
    int failures = 0;

    if (count != 3)
        return 2;
    options.data_file = names[2];
    if (tandem_create(names[1], THREADS * PART, &options, &error) ||
        tandem_open(names[1], NULL, &disk, &error)) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    for (int i = 0; i < THREADS; i++) {
        writers[i].disk = disk;
        writers[i].number = i;
        if (pthread_create(&writers[i].thread, NULL, write_part, &writers[i]))
            return 1;
    }
    for (int i = 0; i < THREADS; i++) {
        void *outcome;
        pthread_join(writers[i].thread, &outcome);
        failures += outcome != NULL;
    }
    if (tandem_read(disk, &byte, 1, 3 * PART, &error) == TANDEM_STATUS_OK)
        printf("the byte at 3 MiB is %d\n", byte);
    if (tandem_read(disk, &byte, 1, THREADS * PART, &error) == TANDEM_STATUS_OUT_OF_RANGE)
        printf("behind the end: %s\n", error.message);
    if (tandem_close(disk, &error)) {
        fprintf(stderr, "%s\n", error.message);
        return 1;
    }
    return failures != 0;
}
