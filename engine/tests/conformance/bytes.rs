//! Moving bytes: none is lost or doubled, and the end comes after the last byte.

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

use landfall_engine::limits::Limits;
use landfall_engine::reactor::{
    Held, Key, PooledBuffer, Readiness, Received, Sent, SocketIo, Transfer, TransferMode,
};
use landfall_engine::sys::SocketError;
use rustix::event::PollFlags;
use rustix::net::{SendFlags, sockopt};

use crate::bench::{Bench, MODES, Pumped, Real, TIMEOUT, reset, run, tcp_pair, until_ready};

const BULK_BYTES: usize = 24 << 20;

/// Returns two registered sockets and their peers, for moving bytes from the first to the second.
fn two<P: Real>(bench: &mut Bench<P>) -> (Key, TcpStream, Key, TcpStream) {
    let ((source, writer), (sink, reader)) = (tcp_pair(), tcp_pair());
    let (source, sink) = (bench.register(source), bench.register(sink));
    bench.await_ready(source, Readiness::OUT);
    bench.await_ready(sink, Readiness::OUT);
    (source, writer, sink, reader)
}

pub(crate) fn bytes_are_reported_and_moved<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        for mode in MODES {
            let (source, mut writer, sink, mut reader) = two(bench);
            for round in 0..5u8 {
                bench.drain_events();
                assert!(!bench.reactor.is_readable(source));
                writer.write_all(&[round; 3]).unwrap();
                bench.await_ready(source, Readiness::IN);
                assert_eq!(bench.pump(source, sink, mode).bytes, 3);
                let mut arrived = [0; 3];
                reader.read_exact(&mut arrived).unwrap();
                assert_eq!(arrived, [round; 3]);
            }
        }
    });
}

pub(crate) fn bytes_that_came_before_the_registration_are_reported<P: Real>(_: &str) {
    let limits = Limits { buffer_bytes: 1024, ..Limits::default() };
    run::<P>(&limits, |bench| {
        for mode in MODES {
            let (source, mut writer) = tcp_pair();
            writer.write_all(&[1; 10 * 1024]).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
            until_ready(&source, PollFlags::RDHUP);
            let source = bench.register(source);
            let (sink, mut reader) = tcp_pair();
            let sink = bench.register(sink);
            bench.await_ready(source, Readiness::IN | Readiness::RDHUP);
            let Pumped { bytes, ended, .. } = bench.pump(source, sink, mode);
            assert_eq!((bytes, ended), (10 * 1024, true), "{mode:?}");
            reader.read_exact(&mut [0; 10 * 1024]).unwrap();
        }
    });
}

pub(crate) fn a_short_read_empties_the_socket<P: Real>(_: &str) {
    let limits = Limits { buffer_bytes: 1024, ..Limits::default() };
    run::<P>(&limits, |bench| {
        let (source, mut writer, sink, _reader) = two(bench);
        let copy = |bench: &mut Bench<P>| bench.reactor.transfer(source, sink, TransferMode::Copy);
        writer.write_all(&[1; 1500]).unwrap();
        until_ready(bench.reactor.socket(source).unwrap(), PollFlags::IN);
        bench.await_ready(source, Readiness::IN);
        assert!(matches!(copy(bench), Transfer::Moved { bytes: 1024, full: true }));
        assert!(bench.reactor.is_readable(source), "a full read proves nothing");
        assert!(matches!(copy(bench), Transfer::Moved { bytes: 476, full: false }));
        let left = bench.reactor.readiness(source);
        assert!(!bench.reactor.is_readable(source), "a short one proves that it is empty: {left:?}");
        // With a FIN, the end may follow a short read.
        bench.drain_events();
        writer.write_all(b"last").unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
        bench.await_ready(source, Readiness::IN | Readiness::RDHUP);
        assert!(matches!(copy(bench), Transfer::Moved { bytes: 4, full: false }));
        assert!(bench.reactor.is_readable(source));
        assert!(matches!(copy(bench), Transfer::Eof));
    });
}

pub(crate) fn eof_comes_after_the_bytes<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        for mode in MODES {
            let (source, mut writer, sink, mut reader) = two(bench);
            writer.write_all(b"the last").unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
            bench.await_ready(source, Readiness::RDHUP);
            let Pumped { bytes, ended, .. } = bench.pump(source, sink, mode);
            assert_eq!((bytes, ended), (8, true), "{mode:?}");
            // The end is permanent.
            assert!(matches!(bench.reactor.transfer(source, sink, TransferMode::Copy), Transfer::Eof));
            bench.reactor.on_socket(sink, |io, socket| io.shutdown_write(socket)).unwrap().unwrap();
            let mut arrived = Vec::new();
            reader.read_to_end(&mut arrived).unwrap();
            assert_eq!(arrived, b"the last");
        }
    });
}

pub(crate) fn bytes_before_a_reset_come_first<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        for mode in MODES {
            let (source, mut writer) = tcp_pair();
            let source = bench.register(source);
            writer.write_all(b"the last").unwrap();
            bench.await_ready(source, Readiness::IN);
            reset(writer);
            bench.await_ready(source, Readiness::ERR);
            assert_eq!(bench.receive(source, mode).0, Received::Bytes(8));
            assert_eq!(bench.receive(source, mode).0, Received::Failed(SocketError::Reset), "{mode:?}");
        }
    });
}

/// Sends to `sink` until a write is blocked. Returns the held bytes, and the total number read.
pub(crate) fn fill<P: Real>(bench: &mut Bench<P>, sink: Key, mode: TransferMode) -> (PooledBuffer, usize) {
    let (source, mut writer) = tcp_pair();
    let source = bench.register(source);
    let socket = bench.reactor.socket(sink).unwrap();
    sockopt::set_socket_send_buffer_size(socket, 32 * 1024).unwrap();
    // A host's default may pace, and an acknowledgement may be delayed by 200 ms (TCP_DELACK_MAX): until then, bytes that
    // were sent earlier are still received.
    sockopt::set_tcp_congestion(socket, "reno").unwrap();
    let mut total = 0;
    loop {
        writer.write_all(&[9; 30_000]).unwrap();
        bench.await_ready(source, Readiness::IN);
        let Pumped { bytes, held, .. } = bench.pump(source, sink, mode);
        total += bytes;
        let Some(mut held) = held else { continue };
        // Wait until TCP is idle.
        let until = Instant::now() + std::time::Duration::from_millis(300);
        while Instant::now() < until {
            bench.turn(Some(until));
            if bench.reactor.readiness(sink).contains(Readiness::OUT) {
                bench.reactor.write(sink, &mut held);
            }
        }
        if held.bytes() > 0 && !bench.reactor.readiness(sink).contains(Readiness::OUT) {
            bench.reactor.close(source);
            bench.drain_events();
            return (held, total);
        }
        bench.write_out(sink, held);
    }
}

pub(crate) fn a_blocked_write_is_reported_when_there_is_room<P: Real>(_: &str) {
    for mode in MODES {
        run::<P>(&Limits::default(), |bench| {
            let (sink, mut reader) = tcp_pair();
            let sink = bench.register(sink);
            let (held, bytes) = fill(bench, sink, mode);
            bench.assert_quiet();
            let reading = std::thread::spawn(move || {
                let mut arrived = vec![0; bytes];
                reader.read_exact(&mut arrived).unwrap();
                arrived.iter().all(|byte| *byte == 9)
            });
            bench.write_out(sink, held);
            assert!(reading.join().unwrap());
        });
    }
}

pub(crate) fn bytes_that_arrive_while_a_write_is_blocked_are_remembered<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let (sink, mut reader) = tcp_pair();
        let (source, mut writer) = tcp_pair();
        let (sink, source) = (bench.register(sink), bench.register(source));
        let (held, bytes) = fill(bench, sink, TransferMode::Copy);
        writer.write_all(b"meanwhile").unwrap();
        bench.await_ready(source, Readiness::IN);
        bench.assert_quiet();
        let reading = std::thread::spawn(move || {
            let mut arrived = vec![0; bytes + 9];
            reader.read_exact(&mut arrived).unwrap();
            arrived.ends_with(b"meanwhile")
        });
        bench.write_out(sink, held);
        assert!(bench.reactor.is_readable(source), "the edge was forgotten");
        assert_eq!(bench.pump(source, sink, TransferMode::Copy).bytes, 9);
        assert!(reading.join().unwrap());
    });
}

pub(crate) fn a_write_to_a_broken_connection_fails<P: Real>(_: &str) {
    for mode in MODES {
        run::<P>(&Limits::default(), |bench| {
            let (sink, reader) = tcp_pair();
            let sink = bench.register(sink);
            let (mut held, _) = fill(bench, sink, mode);
            reset(reader);
            bench.await_ready(sink, Readiness::ERR);
            assert_eq!(bench.reactor.write(sink, &mut held), Sent::Failed(SocketError::Reset), "{mode:?}");
        });
    }
}

pub(crate) fn a_blocked_write_to_a_half_closed_peer_sleeps<P: Real>(_: &str) {
    for mode in MODES {
        run::<P>(&Limits::default(), |bench| {
            let (sink, mut reader) = tcp_pair();
            let sink = bench.register(sink);
            reader.shutdown(Shutdown::Write).unwrap();
            bench.await_ready(sink, Readiness::RDHUP);
            let (held, bytes) = fill(bench, sink, mode);
            bench.assert_quiet();
            bench.assert_quiet();
            let reading = std::thread::spawn(move || reader.read_exact(&mut vec![0; bytes]).unwrap());
            bench.write_out(sink, held);
            reading.join().unwrap();
        });
    }
}

fn pattern(state: &mut u64, bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(8) {
        // xorshift64
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        chunk.copy_from_slice(&state.to_ne_bytes()[..chunk.len()]);
    }
}

/// Moves bulk data from one thread to another through the reactor, and compares the input with the output.
fn relays<P: Real>(mode: fn(usize) -> TransferMode) {
    run::<P>(&Limits::default(), |bench| {
        let (source, mut writer, sink, mut reader) = two(bench);
        let writing = std::thread::spawn(move || {
            let (mut state, mut hasher) = (0x9E37_79B9_7F4A_7C15, DefaultHasher::new());
            let mut block = vec![0; 256 * 1024];
            for _ in 0..BULK_BYTES / block.len() {
                pattern(&mut state, &mut block);
                hasher.write(&block);
                writer.write_all(&block).unwrap();
            }
            hasher.finish()
        });
        let reading = std::thread::spawn(move || {
            let mut arrived = Vec::with_capacity(BULK_BYTES);
            reader.read_to_end(&mut arrived).unwrap();
            let mut hasher = DefaultHasher::new();
            arrived.chunks(256 * 1024).for_each(|block| hasher.write(block));
            (arrived.len(), hasher.finish())
        });
        for round in 0.. {
            let Pumped { held, ended, .. } = bench.pump(source, sink, mode(round));
            if let Some(held) = held {
                bench.write_out(sink, held);
            } else if ended {
                break;
            } else {
                bench.until("readable", |bench| bench.reactor.is_readable(source));
            }
        }
        bench.reactor.on_socket(sink, |io, socket| io.shutdown_write(socket)).unwrap().unwrap();
        assert_eq!(reading.join().unwrap(), (BULK_BYTES, writing.join().unwrap()));
    });
}

pub(crate) fn copied_bytes_arrive_in_order<P: Real>(_: &str) {
    relays::<P>(|_| TransferMode::Copy);
}

pub(crate) fn spliced_bytes_arrive_in_order<P: Real>(_: &str) {
    relays::<P>(|_| TransferMode::Splice);
}

pub(crate) fn mixed_modes_arrive_in_order<P: Real>(_: &str) {
    relays::<P>(|round| MODES[round / 3 % 2]);
}

/// Moves an urgent byte between others, with or without a FIN after them.
fn urgent<P: Real>(fin: bool) {
    run::<P>(&Limits::default(), |bench| {
        for mode in MODES {
            let (source, mut writer) = tcp_pair();
            // The engine sets this on its listeners; accepted sockets inherit it.
            sockopt::set_socket_oobinline(&source, true).unwrap();
            let (sink, mut reader) = tcp_pair();
            let (source, sink) = (bench.register(source), bench.register(sink));
            writer.write_all(b"ab").unwrap();
            rustix::net::send(&writer, b"!", SendFlags::OOB).unwrap();
            writer.write_all(b"cd").unwrap();
            if fin {
                writer.shutdown(Shutdown::Write).unwrap();
                until_ready(bench.reactor.socket(source).unwrap(), PollFlags::RDHUP);
            }
            let mut moved = 0;
            bench.until("all five", |bench| {
                let Pumped { bytes, ended, .. } = bench.pump(source, sink, mode);
                moved += bytes;
                assert!(!ended || moved == 5, "{mode:?}: the end after {moved} bytes");
                moved == 5
            });
            let mut arrived = [0; 5];
            reader.read_exact(&mut arrived).unwrap();
            assert_eq!(&arrived, b"ab!cd", "{mode:?}");
        }
    });
}

pub(crate) fn an_urgent_byte_stays_in_the_stream<P: Real>(_: &str) {
    urgent::<P>(false);
}

pub(crate) fn an_urgent_byte_before_a_fin_stays_in_the_stream<P: Real>(_: &str) {
    urgent::<P>(true);
}

pub(crate) fn without_memory_no_byte_is_read<P: Real>(_: &str) {
    let limits = Limits { buffers_max: 1, pipes_max: 1, ..Limits::default() };
    for mode in MODES {
        run::<P>(&limits, |bench| {
            let (source, mut writer, sink, mut reader) = two(bench);
            let held = bench.reactor.io().lend(mode).unwrap();
            assert!(!bench.reactor.can_lend(mode));
            writer.write_all(b"waits").unwrap();
            bench.await_ready(source, Readiness::IN);
            match bench.reactor.transfer(source, sink, mode) {
                Transfer::Unavailable(of) => assert_eq!(of, mode),
                other => panic!("{other:?}"),
            }
            drop(held);
            assert!(bench.reactor.can_lend(mode) && bench.reactor.is_readable(source));
            assert_eq!(bench.pump(source, sink, mode).bytes, 5);
            reader.read_exact(&mut [0; 5]).unwrap();
        });
    }
}

pub(crate) fn a_pipe_that_holds_bytes_is_not_lent_again<P: Real>(_: &str) {
    let limits = Limits { pipes_max: 1, ..Limits::default() };
    run::<P>(&limits, |bench| {
        let (source, mut writer, sink, mut reader) = two(bench);
        writer.write_all(b"old").unwrap();
        let (received, pipe) = bench.receive(source, TransferMode::Splice);
        assert_eq!(received, Received::Bytes(3));
        drop(pipe);
        bench.drain_events();
        writer.write_all(b"new").unwrap();
        let mut moved = 0;
        bench.until("moved", |bench| {
            moved += bench.pump(source, sink, TransferMode::Splice).bytes;
            moved > 0
        });
        let mut arrived = [0; 3];
        reader.read_exact(&mut arrived).unwrap();
        assert_eq!(&arrived, b"new");
    });
}

pub(crate) fn unacknowledged_bytes_are_counted<P: Real>(_: &str) {
    run::<P>(&Limits::default(), |bench| {
        let (sink, mut reader) = tcp_pair();
        let sink = bench.register(sink);
        let count = |bench: &mut Bench<P>| {
            bench.reactor.on_socket(sink, |io, socket| io.unacknowledged_bytes(socket)).unwrap()
        };
        assert_eq!(count(bench), 0);
        let (held, bytes) = fill(bench, sink, TransferMode::Copy);
        assert!(count(bench) > 0);
        let reading = std::thread::spawn(move || {
            reader.read_exact(&mut vec![0; bytes]).unwrap();
            reader
        });
        bench.write_out(sink, held);
        let _reader = reading.join().unwrap();
        let until = Instant::now() + TIMEOUT;
        while count(bench) > 0 {
            assert!(Instant::now() < until, "never acknowledged");
            std::thread::yield_now();
        }
    });
}
