// Tandem: raw and qcow2 disk images, with external data files. Made by cbindgen: change the crate instead.
//
// Every function that can fail returns a status, which is 0 (TANDEM_STATUS_OK) on success, and tells
// more in the structure that its argument `error` points to, unless that is NULL. There is no other place
// where errors are kept: threads have nothing in common but the disks that they share.
//
// A disk may be used by any number of threads at once, but for tandem_close(), which ends it. Pointers
// are valid or, where that is said, NULL; texts end with a NUL. Nothing that they point to is kept.


#ifndef TANDEM_H
#define TANDEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// The image is in qcow2 format.
#define TANDEM_FORMAT_QCOW2 0

// The file or block device is the disk.
#define TANDEM_FORMAT_RAW 1

// Open: no file is ever written.
#define TANDEM_OPEN_READ_ONLY 1

// Open: the names in the image, and in those below it, are followed to any file. Otherwise they are
// only followed to files in the image's own directory and below it.
#define TANDEM_OPEN_FOLLOW_ANYWHERE 2

// Open: an image that names another file is refused, but for a data file that the options name.
#define TANDEM_OPEN_FOLLOW_NOTHING 4

// Open: the files are not locked; somebody else sees to it that the disk has one user.
#define TANDEM_OPEN_NO_LOCKS 8

// Open: data goes past the host's page cache (O_DIRECT).
#define TANDEM_OPEN_DIRECT 16

// Open: a write is durable when it completes, without a flush.
#define TANDEM_OPEN_WRITE_THROUGH 32

// Create: the data file is a valid raw image of the disk at all times.
#define TANDEM_CREATE_DATA_FILE_RAW 1

// Create: a data file that is there becomes the data of the disk as it is. For raw data files.
#define TANDEM_CREATE_KEEP_DATA_FILE 2

// What has become of a call.
typedef enum {
  // It has done what it was asked to.
  TANDEM_STATUS_OK = 0,
  // An argument, or a field of a structure, makes no sense.
  TANDEM_STATUS_INVALID_ARGUMENT = 1,
  // The system has refused something: `os_error` tells how.
  TANDEM_STATUS_IO = 2,
  // The file does not begin as a qcow2 image does.
  TANDEM_STATUS_NOT_QCOW2 = 3,
  // The image breaks the rules of its format.
  TANDEM_STATUS_INVALID_IMAGE = 4,
  // The image uses a feature that this library does not know, or is built without.
  TANDEM_STATUS_UNSUPPORTED = 5,
  // Another program uses the file, or another disk of this one.
  TANDEM_STATUS_LOCKED = 6,
  // The data file that the image names may not or cannot be used.
  TANDEM_STATUS_DATA_FILE = 7,
  // The backing file that the image names may not or cannot be used, or has changed.
  TANDEM_STATUS_BACKING_FILE = 8,
  // The request does not lie within the disk.
  TANDEM_STATUS_OUT_OF_RANGE = 9,
  // The disk has been opened read-only.
  TANDEM_STATUS_READ_ONLY = 10,
  // A sync has failed, now or earlier: what was written since the last one that succeeded may be lost.
  TANDEM_STATUS_NOT_DURABLE = 11,
  // The image has turned out to be damaged. It is not written any more.
  TANDEM_STATUS_CORRUPT = 12,
  // An option or a size is not possible.
  TANDEM_STATUS_OPTION = 13,
  // Something else; the message tells what.
  TANDEM_STATUS_OTHER = 14,
  // An error in this library.
  TANDEM_STATUS_INTERNAL = 15,
} tandem_status;

// An open disk.
typedef struct tandem_disk tandem_disk;

// What a new image is to be like. What is zero is as usual.
typedef struct {
  // TANDEM_FORMAT_QCOW2 or TANDEM_FORMAT_RAW. A raw disk has none of what follows.
  uint32_t format;
  // TANDEM_CREATE_..., or'ed together.
  uint32_t flags;
  // Bytes in a cluster, or 0 for 64 KiB.
  uint64_t cluster_size;
  // The external data file, as it will stand in the image, or NULL for an image that has its data
  // itself.
  const char *data_file;
  // The backing file, as it will stand in the image, or NULL. It is not opened.
  const char *backing_file;
  // Format of the backing file, if there is one.
  uint32_t backing_format;
  // Must be 0.
  uint32_t reserved32;
  // Must be 0.
  uint64_t reserved[4];
} tandem_create_options;

// What has gone wrong. Nothing in it is to be released.
typedef struct {
  // What the function has returned, too.
  tandem_status status;
  // The `errno` of a system call that has failed, or 0.
  int32_t os_error;
  // One sentence that names the file, the field and the value; empty on success. One that is too long
  // is cut off at the end of a character.
  char message[4088];
} tandem_error;

// How to open a disk. What is zero is as usual.
typedef struct {
  // TANDEM_FORMAT_QCOW2 or TANDEM_FORMAT_RAW. It is never guessed.
  uint32_t format;
  // TANDEM_OPEN_..., or'ed together.
  uint32_t flags;
  // The external data file, in place of the one that the image names, or NULL.
  const char *data_file;
  // Bytes of memory for the mapping of a qcow2 image, or 0 for 4 MiB.
  uint64_t l2_cache_size;
  // Whether a backing file whose format the image does not tell is raw. Otherwise it is refused.
  bool untold_backing_is_raw;
  // Must be 0.
  uint64_t reserved[4];
} tandem_open_options;

// What there is to know of a disk.
typedef struct {
  // Bytes of the disk, a multiple of 512.
  uint64_t size;
  // Bytes in a cluster of a qcow2 image; 0 for a raw disk.
  uint64_t cluster_size;
  // TANDEM_FORMAT_QCOW2 or TANDEM_FORMAT_RAW.
  uint32_t format;
  // In bytes: what begins and ends at multiples of it is written without reading what lies around it.
  uint32_t physical_block_size;
  // In bytes: requests of multiples of it are served best; 0 if that is not known.
  uint32_t optimal_io_size;
  // In bytes: the smallest aligned unit of which a discard releases the space.
  uint32_t discard_granularity;
  // Nothing can be written.
  bool read_only;
  // A write needs a flush to be durable.
  bool write_cache;
} tandem_info;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Version of this library, such as "0.1.0".
const char *tandem_version(void);

// Makes an image for a disk of `size` bytes at `path`. A file that is there is replaced once the new one
// is complete. `options` may be NULL.
tandem_status tandem_create(const char *path,
                            uint64_t size,
                            const tandem_create_options *options,
                            tandem_error *error);

// Opens the disk at `path`, and stores it in `disk`; NULL if that fails. `options` may be NULL.
tandem_status tandem_open(const char *path,
                          const tandem_open_options *options,
                          tandem_disk **disk,
                          tandem_error *error);

// Flushes `disk` and releases it, also if that fails. Nobody may use it meanwhile or later. `disk` may
// be NULL.
tandem_status tandem_close(tandem_disk *disk,
                           tandem_error *error);

// Reads `len` bytes at `offset` of the disk into `buffer`, whose content is unspecified after an error.
tandem_status tandem_read(const tandem_disk *disk,
                          void *buffer,
                          size_t len,
                          uint64_t offset,
                          tandem_error *error);

// Writes the `len` bytes of `buffer` at `offset` of the disk. If that fails, any part of the range may
// have been written, and nothing else.
tandem_status tandem_write(const tandem_disk *disk,
                           const void *buffer,
                           size_t len,
                           uint64_t offset,
                           tandem_error *error);

// Makes what was written before durable.
tandem_status tandem_flush(const tandem_disk *disk, tandem_error *error);

// Tells that the content of `len` bytes at `offset` is not needed any more, so that their space can be
// released. Each part of them keeps its content, or reads as zero from then on.
tandem_status tandem_discard(const tandem_disk *disk,
                             uint64_t offset,
                             uint64_t len,
                             tandem_error *error);

// Makes `len` bytes at `offset` read as zero. With `unmap` their space may be released.
tandem_status tandem_write_zeroes(const tandem_disk *disk,
                                  uint64_t offset,
                                  uint64_t len,
                                  bool unmap,
                                  tandem_error *error);

// Changes the size of the disk to `size` bytes, while others may use it. What it gains reads as zero,
// but for what a raw data file holds there already; what it loses is lost.
tandem_status tandem_resize(const tandem_disk *disk,
                            uint64_t size,
                            tandem_error *error);

// Stores what there is to know of the disk in `info`.
tandem_status tandem_get_info(const tandem_disk *disk, tandem_info *info, tandem_error *error);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TANDEM_H */
