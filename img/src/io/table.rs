//! The commands that there are.

use super::command::{Command, Needs, help};
use super::{inspect, session, transfer};

/// What `qemu-io` can do besides, and this program cannot.
pub const MISSING: &[&str] = &[
    "break",
    "remove_break",
    "resume",
    "wait_break",
    "zone_append",
    "zone_close",
    "zone_finish",
    "zone_open",
    "zone_report",
    "zone_reset",
    "zap",
    "zc",
    "zf",
    "zo",
    "zrp",
    "zrs",
];

/// What most commands have in common.
const COMMAND: Command = Command {
    name: "",
    alias: None,
    arguments: None,
    summary: "",
    help: "",
    count: (0, Some(0)),
    needs: Needs::Image,
    is_asynchronous: false,
    run: help,
};

/// All commands, sorted by name.
pub const COMMANDS: &[Command] = &[
    Command {
        name: "abort",
        summary: "simulate a program crash using abort(3)",
        needs: Needs::Nothing,
        run: session::abort,
        ..COMMAND
    },
    Command {
        name: "aio_discard",
        arguments: Some("[-Cq] off len"),
        summary: "asynchronously discards a number of bytes",
        help: "
 As 'discard', and succeeds whatever becomes of the request.

 Example:
 'aio_discard 1M 64k'

",
        count: (2, None),
        needs: Needs::WritableImage,
        is_asynchronous: true,
        run: transfer::aio_discard,
        ..COMMAND
    },
    Command {
        name: "aio_flush",
        summary: "completes all outstanding aio requests",
        run: inspect::aio_flush,
        ..COMMAND
    },
    Command {
        name: "aio_read",
        arguments: Some("[-Ciqrv] [-P pattern] off len [len..]"),
        summary: "asynchronously reads a number of bytes",
        help: "
 As 'readv', and succeeds whatever becomes of the request.

 Example:
 'aio_read -P 0 0 64k'

 -i      count a request that is not valid, and do nothing
 -C, -P, -q, -r, -v as for 'readv'

",
        count: (2, None),
        is_asynchronous: true,
        run: transfer::aio_read,
        ..COMMAND
    },
    Command {
        name: "aio_write",
        arguments: Some("[-Cfiqruz] [-P pattern] off len [len..]"),
        summary: "asynchronously writes a number of bytes",
        help: "
 As 'writev', and succeeds whatever becomes of the request.

 Example:
 'aio_write -z -u 1M 64k'

 -i      count a request that is not valid, and do nothing
 -z      write zeroes; takes one length
 -u      with -z: give the space back
 -C, -f, -P, -q, -r as for 'writev'

",
        count: (2, None),
        needs: Needs::WritableImage,
        is_asynchronous: true,
        run: transfer::aio_write,
        ..COMMAND
    },
    Command {
        name: "alloc",
        alias: Some("a"),
        arguments: Some("offset [count]"),
        summary: "checks if offset is allocated in the file",
        count: (1, Some(2)),
        run: inspect::alloc,
        ..COMMAND
    },
    Command {
        name: "close",
        alias: Some("c"),
        summary: "close the current open file",
        run: session::close,
        ..COMMAND
    },
    Command {
        name: "discard",
        alias: Some("d"),
        arguments: Some("[-Cq] off len"),
        summary: "discards a number of bytes at a specified offset",
        help: "
 Gives the content of a range up, and its space back.

 Example:
 'discard 1M 64k'

 -C      report in one line for programs
 -q      do not report

",
        count: (2, None),
        needs: Needs::WritableImage,
        run: transfer::discard,
        ..COMMAND
    },
    Command {
        name: "flush",
        alias: Some("f"),
        summary: "flush all in-core file state to disk",
        run: inspect::flush,
        ..COMMAND
    },
    Command {
        name: "help",
        alias: Some("?"),
        arguments: Some("[command]"),
        summary: "help for one or all commands",
        count: (0, Some(1)),
        needs: Needs::Nothing,
        run: help,
        ..COMMAND
    },
    Command {
        name: "info",
        alias: Some("i"),
        summary: "prints information about the current file",
        run: inspect::info,
        ..COMMAND
    },
    Command {
        name: "length",
        alias: Some("l"),
        summary: "gets the length of the current file",
        run: inspect::length,
        ..COMMAND
    },
    Command {
        name: "map",
        arguments: Some(""),
        summary: "prints the allocated areas of a file",
        run: inspect::map,
        ..COMMAND
    },
    Command {
        name: "open",
        alias: Some("o"),
        arguments: Some("[-rsCnkU] [-t cache] [-d discard] [-o options] [path]"),
        summary: "open the file specified by path",
        help: "
 Opens an image for the commands that follow.

 Example:
 'open -r -t none -o driver=qcow2,data-file.filename=disk.raw disk.qcow2'

 -r      for reading only
 -s      leave the image as it is: a temporary one takes what is written
 -C      keep what is read from a backing file
 -n      past the page cache, as -t none
 -U      share the image with programs that write it
 -k      as -i native
 -i      threads, native or io_uring; only what QEMU checks is checked
 -t      cache mode: writethrough (default), writeback, none, directsync, unsafe
 -d      unmap (default) gives discarded space back, ignore does not
 -o      options of the image, as --image-opts takes them

",
        count: (1, None),
        needs: Needs::Nothing,
        run: session::open,
        ..COMMAND
    },
    Command {
        name: "quit",
        alias: Some("q"),
        summary: "exit the program",
        count: (0, None),
        needs: Needs::Nothing,
        run: session::quit,
        ..COMMAND
    },
    Command {
        name: "read",
        alias: Some("r"),
        arguments: Some("[-abCqrv] [-P pattern [-s off] [-l len]] off len"),
        summary: "reads a number of bytes at a specified offset",
        help: "
 Reads a range, and looks at it if that is asked for.

 Examples:
 'read -v 4k 512'
 'read -P 0xcd -s 512 -l 1k 64k 4k'

 -P      fail unless all bytes are this one
 -s, -l  where in what was read -P begins, and for how long
 -v      show what was read
 -C      report in one line for programs
 -q      neither show nor report
 -b      from the state of a virtual machine, which lies behind the disk
 -p, -r  change nothing

",
        count: (2, None),
        run: transfer::read,
        ..COMMAND
    },
    Command {
        name: "readv",
        arguments: Some("[-Cqrv] [-P pattern] off len [len..]"),
        summary: "reads a number of bytes at a specified offset",
        help: "
 Reads a range into several buffers.

 Example:
 'readv -P 0 4k 512 1k 512'

 -C, -P, -q, -r, -v as for 'read'

",
        count: (2, None),
        run: transfer::readv,
        ..COMMAND
    },
    Command {
        name: "reopen",
        arguments: Some("[(-r|-w)] [-c cache] [-o options]"),
        summary: "reopens an image with new options",
        help: "
 Closes the image and opens it in another way; if that fails, in the old one.

 Example:
 'reopen -w -c writeback'

 -r, -w  for reading only, or for writing
 -c      with this cache mode
 -o      as for 'open', but for what tells which files are opened

",
        count: (0, None),
        run: session::reopen,
        ..COMMAND
    },
    Command {
        name: "sigraise",
        arguments: Some("signal"),
        summary: "raises a signal",
        help: "
 Sends the signal of this number to the program itself.

 Example:
 'sigraise 9'

",
        count: (1, Some(1)),
        needs: Needs::Nothing,
        run: session::raise,
        ..COMMAND
    },
    Command {
        name: "sleep",
        summary: "waits for the given value in milliseconds",
        count: (1, Some(1)),
        needs: Needs::Nothing,
        run: session::sleep,
        ..COMMAND
    },
    Command {
        name: "truncate",
        alias: Some("t"),
        arguments: Some("[-m prealloc_mode] off"),
        summary: "truncates the current file at the given offset",
        count: (1, Some(3)),
        needs: Needs::WritableImage,
        run: inspect::truncate,
        ..COMMAND
    },
    Command {
        name: "write",
        alias: Some("w"),
        arguments: Some("[-bcCfnqruz] [-P pattern | -s source_file] off len"),
        summary: "writes a number of bytes at a specified offset",
        help: "
 Writes the byte 0xcd, or something else, to a range.

 Examples:
 'write -P 7 4k 64k'
 'write -z -u 1M 1M'
 'write -c -s cluster.bin 0 64k'

 -P      this byte
 -s      what is in this file, again and again
 -z      zeroes
 -u      with -z: give the space back
 -n      with -z: fail rather than write zeros
 -c      in compressed clusters, which must be whole
 -f      durable when it is done
 -C      report in one line for programs
 -q      do not report
 -b      to the state of a virtual machine, which lies behind the disk
 -p, -r  change nothing

",
        count: (2, None),
        needs: Needs::WritableImage,
        run: transfer::write,
        ..COMMAND
    },
    Command {
        name: "writev",
        arguments: Some("[-Cfqr] [-P pattern] off len [len..]"),
        summary: "writes a number of bytes at a specified offset",
        help: "
 Writes the byte 0xcd, or another one, from several buffers.

 Example:
 'writev -P 7 4k 512 1k 512'

 -C, -f, -P, -q, -r as for 'write'

",
        count: (2, None),
        needs: Needs::WritableImage,
        run: transfer::writev,
        ..COMMAND
    },
];
