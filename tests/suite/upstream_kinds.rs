//! Claims 1, 2, 3, 4 and 9 with the other kinds of upstreams: sockets of an agent, and a driver that dials.

use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Duration;

use landfall_engine::RingChoice;
use landfall_engine::channel::Channel;
use landfall_engine::command::{Ending, Event, ForwardId, Reach, UpstreamKind, WatchSources};
use landfall_engine::limits::Limits;
use landfall_engine::opener::{Answer, DialFailure, Request};
use landfall_tests::case::Case;
use landfall_tests::{Driver, End, Pattern, Relay, TIMEOUT, set_upstream_kind};

use crate::observe::ends_by;
use crate::{half_close, leaks, refusal, reset, streams};

/// Defines a case for the test of a claim with each kind.
macro_rules! cases {
    ($($dialler:ident, $agent:ident: $test:path;)*) => {
        $(
            fn $dialler(ring: RingChoice) {
                set_upstream_kind(UpstreamKind::Dialler);
                $test(ring);
            }

            fn $agent(ring: RingChoice) {
                set_upstream_kind(UpstreamKind::Agent);
                $test(ring);
            }
        )*
        pub(crate) const CASES: &[Case] = &[
            Case::each_ring("c04_a_late_or_missing_dial_result_is_a_reset", late_result),
            Case::each_ring("c04_dial_failures_are_reported_and_counted", failure_reasons),
            Case::each_ring("c04_forwards_end_with_the_driver_that_dials_for_them", driver_disconnects),
            $(
            Case::each_ring(stringify!($dialler), $dialler),
            Case::each_ring(stringify!($agent), $agent),
        )*];
    };
}

cases! {
    c01_by_a_driver_every_byte_arrives, c01_by_an_agent_every_byte_arrives:
        streams::every_byte_arrives_once_in_order;
    c02_by_a_driver_megabytes_after_a_fin, c02_by_an_agent_megabytes_after_a_fin:
        half_close::ten_mebibytes_come_back_after_a_fin;
    c02_by_a_driver_both_finish_at_once, c02_by_an_agent_both_finish_at_once:
        half_close::both_ends_finish_at_once;
    c02_by_a_driver_a_fin_right_after_connect, c02_by_an_agent_a_fin_right_after_connect:
        half_close::a_fin_right_after_connect;
    c02_by_a_driver_a_half_closed_one_stays, c02_by_an_agent_a_half_closed_one_stays:
        half_close::a_half_closed_connection_stays;
    c03_by_a_driver_a_reset_stays_one, c03_by_an_agent_a_reset_stays_one:
        reset::as_with_a_direct_connection;
    c03_by_a_driver_a_stalled_reader_is_reset, c03_by_an_agent_a_stalled_reader_is_reset:
        reset::a_reset_finds_a_reader_that_stalls;
    c03_by_a_driver_a_megabyte_before_a_reset, c03_by_an_agent_a_megabyte_before_a_reset:
        reset::a_megabyte_before_a_reset_arrives;
    c03_by_a_driver_the_unacknowledged_arrives, c03_by_an_agent_the_unacknowledged_arrives:
        reset::what_is_not_yet_acknowledged_arrives;
    c04_by_a_driver_a_refused_connect_is_a_reset, c04_by_an_agent_a_refused_connect_is_a_reset:
        refusal::a_refused_connect_is_a_reset;
    c04_by_a_driver_a_server_that_ends, c04_by_an_agent_a_server_that_ends:
        refusal::a_server_that_ends;
    c09_by_a_driver_churn_leaks_nothing, c09_by_an_agent_churn_leaks_nothing:
        leaks::churn;
    c09_by_a_driver_nothing_is_left, c09_by_an_agent_nothing_is_left:
        leaks::engines_and_upstreams;
}

const FORWARD: ForwardId = ForwardId(1);
const PORT: u16 = 3000;

/// Starts an engine with a forward whose dials this thread answers.
fn start_with_driver(ring: RingChoice, limits: Limits) -> (Driver, Channel) {
    let mut driver = Driver::start(limits, ring);
    let (engines, ours) = Channel::pair().unwrap();
    let entered = (1 << 63, WatchSources::default(), vec![engines.into()]);
    driver.add_entered(Relay::UPSTREAM, UpstreamKind::Dialler, entered);
    driver.open(FORWARD, Relay::UPSTREAM, (PORT, 80), Reach::UNKNOWN).unwrap();
    (driver, ours)
}

fn client() -> TcpStream {
    landfall_tests::connect(([127, 0, 0, 1], PORT))
}

#[track_caller]
fn next_dial(ours: &Channel) -> u64 {
    let (request, _) = ours.recv_timeout::<Request>(TIMEOUT).unwrap().unwrap();
    let Request::Dial { dial, port } = request else {
        panic!("{request:?} where a dial was to be asked for")
    };
    assert_eq!(port.get(), 80);
    dial
}

/// Makes both ends of a connection, as a driver does.
fn pair() -> (TcpStream, TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let one = landfall_tests::connect(listener.local_addr().unwrap());
    (one, listener.accept().unwrap().0)
}

fn late_result(ring: RingChoice) {
    let limits = Limits { connect_timeout: Duration::from_millis(200), ..Limits::default() };
    let (mut driver, ours) = start_with_driver(ring, limits);
    let waiting = client();
    let late = next_dial(&ours);
    assert_eq!(ends_by(&waiting), End::Reset);
    // The socket of a late answer is reset; the next dial is not affected.
    let (theirs, far) = pair();
    ours.send(&Answer::Dialled { dial: late }, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    assert_eq!(ends_by(&far), End::Reset);
    let waiting = client();
    let dial = next_dial(&ours);
    assert_ne!(dial, late);
    let (theirs, far) = pair();
    ours.send(&Answer::Dialled { dial }, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    landfall_tests::send_all(&far, Pattern::new(1), 1000);
    landfall_tests::finish(&far);
    let mut checker = Pattern::new(1).checker();
    assert_eq!(landfall_tests::read_to_end(&waiting, &mut checker), End::Eof);
    assert_eq!(checker.position(), 1000);
    landfall_tests::finish(&waiting);
    assert_eq!(ends_by(&far), End::Eof);
    let stats = driver.close(FORWARD, Ending::Drain);
    assert_eq!((stats.accepted, stats.refused), (2, 1), "{stats:?}");
}

/// Answers in a different order than the requests, each for its own client.
fn failure_reasons(ring: RingChoice) {
    let (mut driver, ours) = start_with_driver(ring, Limits::default());
    let clients: Vec<TcpStream> = (0..3).map(|_| client()).collect();
    let dials: Vec<u64> = (0..3).map(|_| next_dial(&ours)).collect();
    let whys = [DialFailure::Refused, DialFailure::TimedOut, DialFailure::Exhausted];
    for (dial, why) in dials.into_iter().zip(whys).rev() {
        ours.send(&Answer::NotDialled { dial, why }, &[]).unwrap();
    }
    for client in &clients {
        assert_eq!(ends_by(client), End::Reset);
    }
    // A server that aborts at once, after a byte: the client receives both.
    let waiting = client();
    let dial = next_dial(&ours);
    let (theirs, far) = pair();
    landfall_tests::send_all(&far, Pattern::new(1), 10);
    landfall_tests::reset(far);
    ours.send(&Answer::Dialled { dial }, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let mut checker = Pattern::new(1).checker();
    assert_eq!(landfall_tests::read_to_end(&waiting, &mut checker), End::Reset);
    assert_eq!(checker.position(), 10);
    let stats = driver.close(FORWARD, Ending::Drain);
    assert_eq!((stats.refused, stats.exhausted, stats.reset_by_upstream), (2, 1, 1), "{stats:?}");
}

fn driver_disconnects(ring: RingChoice) {
    let (mut driver, ours) = start_with_driver(ring, Limits::default());
    // One connection is relayed, and one waits.
    let open = client();
    let dial = next_dial(&ours);
    let (theirs, far) = pair();
    ours.send(&Answer::Dialled { dial }, &[theirs.as_fd()]).unwrap();
    drop(theirs);
    let waiting = client();
    next_dial(&ours);
    drop(ours);
    assert_eq!(ends_by(&waiting), End::Reset);
    let reason = driver.expect("the upstream to be lost", |event| match event {
        Event::UpstreamRemoved { reason, .. } => Some(reason.clone()),
        _ => None,
    });
    assert!(
        reason.as_ref().is_some_and(|reason| reason.contains("the program that connects for it has ended")),
        "{reason:?}"
    );
    assert!(TcpStream::connect(("127.0.0.1", PORT)).is_err());
    // Open connections continue until they end.
    landfall_tests::finish(&open);
    assert_eq!(ends_by(&far), End::Eof);
    landfall_tests::finish(&far);
    assert_eq!(ends_by(&open), End::Eof);
}
