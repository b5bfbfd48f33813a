//! Claim 3: a reset stays a reset, and the bytes before it still arrive. The reference is what a direct connection shows.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use landfall_engine::RingChoice;
use landfall_engine::limits::Limits;
use landfall_tests::case::Case;
use landfall_tests::{End, Pattern, Relay, Server, connect, finish, read_exactly, reset, send_all};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::observe::{Path, Side, read_rest, write_reports_that_the_peer_is_gone};

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c03_resets_look_like_those_of_a_direct_connection", as_with_a_direct_connection),
    Case::each_ring("c03_a_reset_reaches_a_stalled_reader", a_reset_finds_a_reader_that_stalls),
    Case::each_ring(
        "c03_a_reset_ends_a_connection_whose_reader_never_reads",
        a_reset_ends_a_connection_whose_reader_never_reads,
    ),
    Case::each_ring("c03_a_megabyte_before_a_reset_arrives", a_megabyte_before_a_reset_arrives),
    Case::each_ring("c03_unacknowledged_data_arrives_before_a_reset", what_is_not_yet_acknowledged_arrives),
];

/// The observation of the end that did not break the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Observation {
    /// The number of bytes, each right, and how the stream ended.
    pub(crate) read: (u64, End),
    /// Whether a write reported that the peer is gone.
    pub(crate) told_by_write: bool,
}

/// A script: the first stream breaks the connection, the other one observes.
pub(crate) type Script = fn(&Path, Side) -> Observation;

pub(crate) const SCRIPTS: [(&str, Script); 7] = [
    ("reset before any data", before_data),
    ("reset after data that arrived", after_data),
    ("reset after data in both directions", after_data_both_ways),
    ("reset after a FIN was seen", after_fin_seen),
    ("reset right after a FIN", right_after_fin),
    ("close with unread data", close_with_unread_data),
    ("reset by the one that got a FIN", by_the_side_that_finished),
];

const BYTES: u64 = 40_000;

fn before_data(path: &Path, side: Side) -> Observation {
    let (breaker, other) = path.pair().split(side);
    reset(breaker);
    observe_end(&other, 0)
}

fn after_data(path: &Path, side: Side) -> Observation {
    let pair = path.pair();
    send_all(pair.end(side), Pattern::new(1), BYTES);
    pair.delivered(side);
    let (breaker, other) = pair.split(side);
    reset(breaker);
    observe_end(&other, 0)
}

fn after_data_both_ways(path: &Path, side: Side) -> Observation {
    let pair = path.pair();
    send_all(pair.end(side), Pattern::new(1), BYTES);
    let (breaker, other) = pair.split(side);
    let mut checker = Pattern::new(1).checker();
    read_exactly(&other, &mut checker, BYTES);
    send_all(&other, Pattern::new(2), BYTES);
    read_exactly(&breaker, &mut Pattern::new(2).checker(), BYTES);
    reset(breaker);
    let read = read_rest(&other, &mut checker);
    Observation { read, told_by_write: write_reports_that_the_peer_is_gone(&other) }
}

fn after_fin_seen(path: &Path, side: Side) -> Observation {
    let (breaker, other) = path.pair().split(side);
    send_all(&breaker, Pattern::new(1), BYTES);
    finish(&breaker);
    let read = read_rest(&other, &mut Pattern::new(1).checker());
    reset(breaker);
    Observation { read, told_by_write: write_reports_that_the_peer_is_gone(&other) }
}

fn right_after_fin(path: &Path, side: Side) -> Observation {
    let pair = path.pair();
    send_all(pair.end(side), Pattern::new(1), BYTES);
    finish(pair.end(side));
    pair.delivered(side);
    let (breaker, other) = pair.split(side);
    reset(breaker);
    observe_end(&other, 0)
}

fn close_with_unread_data(path: &Path, side: Side) -> Observation {
    let pair = path.pair();
    let (breaker, other) = pair.split(side);
    (&other).write_all(b"never read").unwrap();
    // The data must have arrived; otherwise the close would send a FIN.
    landfall_tests::wait_until("the data to arrive", || {
        let mut byte = [0];
        breaker.peek(&mut byte).map(drop)
    });
    drop(breaker);
    observe_end(&other, 0)
}

fn by_the_side_that_finished(path: &Path, side: Side) -> Observation {
    let (breaker, other) = path.pair().split(side);
    finish(&other);
    assert_eq!(read_rest(&breaker, &mut Pattern::new(9).checker()), (0, End::Eof));
    reset(breaker);
    let read = read_rest(&other, &mut Pattern::new(1).checker());
    // Its own direction is finished, so it cannot write.
    Observation { read, told_by_write: true }
}

fn observe_end(other: &TcpStream, skip: u64) -> Observation {
    let mut checker = Pattern::new(1).checker();
    let (bytes, end) = read_rest(other, &mut checker);
    Observation { read: (bytes - skip, end), told_by_write: write_reports_that_the_peer_is_gone(other) }
}

pub(crate) fn as_with_a_direct_connection(ring: RingChoice) {
    let (direct, relayed) = (Path::direct(), Path::landfall(ring));
    for (name, script) in SCRIPTS {
        for side in [Side::Client, Side::Server] {
            let expected = script(&direct, side);
            // Each several times, because two events that are close together may arrive in either order.
            for round in 0..10 {
                assert_eq!(script(&relayed, side), expected, "{name}, by the {side:?}, round {round}");
            }
        }
    }
}

/// A client that stops reading gets the reset as soon as it reads again, after every byte that was acknowledged.
pub(crate) fn a_reset_finds_a_reader_that_stalls(ring: RingChoice) {
    let path = Path::landfall(ring);
    for side in [Side::Client, Side::Server] {
        let pair = path.pair();
        let sent = fill(pair.end(side));
        let (breaker, other) = pair.split(side);
        reset(breaker);
        let (bytes, end) = read_rest(&other, &mut Pattern::new(1).checker());
        assert_eq!(end, End::Reset);
        assert!(bytes > 0 && bytes <= sent, "{bytes} of {sent}");
    }
}

/// Sends until no buffer on the path has room. Returns how many bytes were sent.
fn fill(mut sender: &TcpStream) -> u64 {
    sender.set_nonblocking(true).unwrap();
    let (mut sent, mut full) = (0, 0);
    let mut buffer = vec![0; 64 * 1024];
    landfall_tests::wait_until("the path to be full", || {
        Pattern::new(1).fill(sent, &mut buffer);
        match sender.write(&buffer) {
            Ok(bytes) => (sent, full) = (sent + bytes as u64, 0),
            Err(_) => full += 1,
        }
        if full >= 20 { Ok(()) } else { Err(sent) }
    });
    sent
}

/// The relay holds bytes for the reader and does not read in the meantime, so no read returns the error of the reset.
pub(crate) fn a_reset_ends_a_connection_whose_reader_never_reads(ring: RingChoice) {
    let limits = Limits { reset_drain_timeout: Duration::from_millis(100), ..Limits::default() };
    let mut relay = Relay::start_with(limits, ring);
    let server = Server::listen(&relay.inside, "127.0.0.1:0");
    let forward = relay.forward(server.port());
    let before = relay.stats(forward);
    for side in [Side::Client, Side::Server] {
        let client = connect(forward.v4());
        let accepted = server.accept();
        let (breaker, reader) = if side == Side::Client { (client, accepted) } else { (accepted, client) };
        fill(&breaker);
        reset(breaker);
        relay.stats_become(forward, "the connection to have ended", |stats| stats.open == 0);
        assert_eq!(read_rest(&reader, &mut Pattern::new(1).checker()).1, End::Reset, "reset by the {side:?}");
    }
    let stats = relay.stats(forward);
    assert_eq!(stats.reset_by_downstream - before.reset_by_downstream, 1, "{stats:?}");
    assert_eq!(stats.reset_by_upstream - before.reset_by_upstream, 1, "{stats:?}");
}

/// The receiver reads slowly, and the reset arrives as soon as the relay has acknowledged the last byte.
pub(crate) fn a_megabyte_before_a_reset_arrives(ring: RingChoice) {
    const COUNT: u64 = 1_000_000;
    let path = Path::landfall(ring);
    for side in [Side::Client, Side::Server] {
        for _ in 0..5 {
            let pair = path.pair();
            std::thread::scope(|scope| {
                let reading = scope.spawn(|| {
                    let other = if side == Side::Client { &pair.server } else { &pair.client };
                    read_rest(other, &mut Pattern::new(1).checker())
                });
                send_all(pair.end(side), Pattern::new(1), COUNT);
                pair.delivered(side);
                reset_shared(pair.end(side));
                assert_eq!(reading.join().unwrap(), (COUNT, End::Reset), "sent by the {side:?}");
            });
        }
    }
}

/// Resets a connection whose other descriptor another thread uses: connecting with AF_UNSPEC dissolves the association
/// (`connect(2)`), and the kernel sends the peer a reset.
fn reset_shared(stream: &TcpStream) {
    rustix::net::connect_unspec(stream).unwrap();
}

/// The reader's window is small, so nearly all bytes wait in the relay's send queue when the reset arrives. An abortive
/// close would discard that queue.
pub(crate) fn what_is_not_yet_acknowledged_arrives(ring: RingChoice) {
    const COUNT: u64 = 200_000;
    let mut relay = Relay::start(ring);
    let server = Server::from_socket(relay.inside.run(|| {
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let socket = socket.unwrap();
        sockopt::set_socket_recv_buffer_size(&socket, 4_096).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 3000))).unwrap();
        rustix::net::listen(&socket, 16).unwrap();
        socket
    }));
    let forward = relay.forward(3000);
    let client = connect(forward.v4());
    let accepted = server.accept();
    send_all(&client, Pattern::new(1), COUNT);
    relay.stats_become(forward, "the relay to have read everything", |stats| stats.bytes_up == COUNT);
    reset(client);
    assert_eq!(read_rest(&accepted, &mut Pattern::new(1).checker()), (COUNT, End::Reset));
}
