use super::*;
use std::collections::VecDeque;

use proptest::prelude::*;

const WINDOW: usize = INITIAL_CREDIT_BYTES as usize;

fn stream(extensions: Extensions) -> Stream {
    Stream::new(Side::Downstream, extensions)
}

#[track_caller]
fn expect(stream: &mut Stream, input: Input, expected: &[Action]) {
    let mut actions = Vec::new();
    stream.on(input, &mut actions);
    assert_eq!(actions, expected, "{input:?} of {stream:?}");
}

#[test]
fn without_extensions_a_fin_is_a_close_and_earlier_payload_is_written() {
    let mut stream = stream(Extensions::NONE);
    expect(&mut stream, Input::Payload(10), &[]);
    expect(&mut stream, Input::Eof, &[Action::Close(Side::Downstream)]);
    assert!(!stream.takes_payload());
    expect(&mut stream, Input::Payload(10), &[]);
    expect(&mut stream, Input::Wrote(9), &[]);
    expect(&mut stream, Input::Wrote(1), &[Action::Fin, Action::Finish(Ended::ByUs, Closing::Orderly)]);
}

#[test]
fn a_close_of_the_peer_is_a_fin_after_its_payload_and_is_not_answered() {
    for extensions in [Extensions::NONE, Extensions::ALL] {
        let mut stream = stream(extensions);
        expect(&mut stream, Input::Payload(10), &[]);
        expect(&mut stream, Input::Close, &[Action::DropOutgoing]);
        assert_eq!(stream.may_read(), 0);
        expect(
            &mut stream,
            Input::Wrote(10),
            &[Action::Fin, Action::Finish(Ended::ByPeer, Closing::Acknowledged)],
        );
    }
}

#[test]
fn with_half_close_one_direction_outlives_the_other() {
    let mut stream = stream(Extensions::ALL);
    expect(&mut stream, Input::Eof, &[Action::Eof]);
    expect(&mut stream, Input::Payload(5), &[]);
    expect(&mut stream, Input::Wrote(5), &[]);
    expect(&mut stream, Input::PeerEof, &[Action::Fin, Action::Finish(Ended::Complete, Closing::Orderly)]);

    let mut stream = crate::broker::stream::tests::stream(Extensions::ALL);
    expect(&mut stream, Input::Payload(5), &[]);
    expect(&mut stream, Input::PeerEof, &[]);
    expect(&mut stream, Input::Wrote(5), &[Action::Fin]);
    expect(&mut stream, Input::Read(7), &[]);
    expect(&mut stream, Input::Eof, &[Action::Eof, Action::Finish(Ended::Complete, Closing::Orderly)]);
}

#[test]
fn a_reset_is_passed_on_if_the_peer_supports_resets() {
    let mut with = stream(Extensions::ALL);
    expect(&mut with, Input::ReadBroke, &[Action::Reset, Action::Finish(Ended::ByUs, Closing::Reset)]);
    let mut without = stream(Extensions::NONE);
    expect(
        &mut without,
        Input::ReadBroke,
        &[Action::Close(Side::Downstream), Action::Finish(Ended::ByUs, Closing::Reset)],
    );
    // Also after its FIN, while the other direction is open.
    let mut half = stream(Extensions::ALL);
    expect(&mut half, Input::Eof, &[Action::Eof]);
    expect(&mut half, Input::WriteBroke, &[Action::Reset, Action::Finish(Ended::ByUs, Closing::Reset)]);
}

#[test]
fn a_socket_that_accepts_no_data_is_first_read_to_its_end() {
    let mut stream = stream(Extensions::ALL);
    expect(&mut stream, Input::Payload(5), &[]);
    expect(&mut stream, Input::WriteBroke, &[Action::DropIncoming]);
    expect(&mut stream, Input::WriteBroke, &[]);
    expect(&mut stream, Input::Payload(5), &[]);
    assert!(stream.may_read() > 0);
    expect(&mut stream, Input::Read(5), &[]);
    expect(&mut stream, Input::Eof, &[Action::Reset, Action::Finish(Ended::ByUs, Closing::Reset)]);
}

#[test]
fn a_reset_of_the_peer_follows_its_payload() {
    let mut stream = stream(Extensions::ALL);
    expect(&mut stream, Input::Payload(5), &[]);
    expect(&mut stream, Input::Reset, &[Action::DropOutgoing]);
    // The connection may be lost meanwhile.
    expect(&mut stream, Input::Lost, &[]);
    expect(&mut stream, Input::Wrote(5), &[Action::Finish(Ended::ByPeer, Closing::ResetAcknowledged)]);
    let mut broken = crate::broker::stream::tests::stream(Extensions::ALL);
    expect(&mut broken, Input::Payload(5), &[]);
    expect(&mut broken, Input::Reset, &[Action::DropOutgoing]);
    expect(&mut broken, Input::WriteBroke, &[Action::Finish(Ended::ByPeer, Closing::Reset)]);
}

#[test]
fn a_lost_connection_resets_only_incomplete_streams() {
    let lost = Action::Finish(Ended::Lost, Closing::Reset);
    let mut open = stream(Extensions::ALL);
    expect(&mut open, Input::Lost, &[lost]);
    let mut half = stream(Extensions::ALL);
    expect(&mut half, Input::Eof, &[Action::Eof]);
    expect(&mut half, Input::Lost, &[lost]);
    let mut other_half = stream(Extensions::ALL);
    expect(&mut other_half, Input::PeerEof, &[Action::Fin]);
    expect(&mut other_half, Input::Lost, &[lost]);
    let mut complete = stream(Extensions::ALL);
    expect(&mut complete, Input::Payload(5), &[]);
    expect(&mut complete, Input::PeerEof, &[]);
    expect(&mut complete, Input::Eof, &[Action::Eof]);
    expect(&mut complete, Input::Lost, &[]);
    expect(&mut complete, Input::Wrote(5), &[Action::Fin, Action::Finish(Ended::Complete, Closing::Orderly)]);
}

#[test]
fn reads_are_limited_to_the_granted_credit() {
    let mut stream = stream(Extensions::ALL);
    let mut read = 0;
    while stream.may_read() > 0 {
        let bytes = stream.may_read();
        read += bytes;
        expect(&mut stream, Input::Read(bytes), &[]);
    }
    assert_eq!(read, WINDOW);
    assert!(stream.is_reading());
    expect(&mut stream, Input::Credit(3), &[]);
    assert_eq!(stream.may_read(), 3);
    expect(&mut stream, Input::Credit(u32::MAX), &[]);
    assert_eq!(stream.may_read(), PAYLOAD_BYTES_MAX);
}

#[test]
fn written_bytes_are_granted_back_in_halves_of_the_window() {
    let mut stream = stream(Extensions::ALL);
    expect(&mut stream, Input::Payload(WINDOW), &[]);
    expect(&mut stream, Input::Wrote(WINDOW / 2 - 1), &[]);
    expect(&mut stream, Input::Wrote(11), &[Action::Grant(INITIAL_CREDIT_BYTES / 2 + 10)]);
    // No grant is sent to a peer that has ended its direction.
    expect(&mut stream, Input::PeerEof, &[]);
    expect(&mut stream, Input::Wrote(WINDOW), &[Action::Fin]);
    // No grant is sent without the extension.
    let mut plain = crate::broker::stream::tests::stream(Extensions::NONE);
    expect(&mut plain, Input::Payload(WINDOW), &[]);
    expect(&mut plain, Input::Wrote(WINDOW), &[]);
}

#[test]
fn a_peer_that_sends_more_than_was_granted_is_reset() {
    let mut stream = stream(Extensions::ALL);
    expect(&mut stream, Input::Payload(WINDOW), &[]);
    expect(
        &mut stream,
        Input::Payload(1),
        &[Action::DropOutgoing, Action::Reset, Action::Finish(Ended::Overflown, Closing::Reset)],
    );
    let mut plain = crate::broker::stream::tests::stream(Extensions::NONE);
    expect(&mut plain, Input::Payload(WINDOW), &[]);
    expect(&mut plain, Input::Payload(1), &[]);
    expect(
        &mut plain,
        Input::Overflow,
        &[
            Action::DropOutgoing,
            Action::Close(Side::Downstream),
            Action::Finish(Ended::Overflown, Closing::Reset),
        ],
    );
}

/// One end with its application. Bytes are only counted: a stream that loses none and keeps their order is lossless.
struct End {
    machine: Stream,
    /// The bytes that the application has left to send, and whether it resets after that.
    unsent: usize,
    resets: bool,
    fin_read: bool,
    queued: usize,
    received: usize,
    fin_received: bool,
    finished: Option<(Ended, Closing)>,
    /// Messages in transit to the other end.
    wire: VecDeque<Input>,
}

impl End {
    fn new(us: Side, extensions: Extensions, unsent: usize, resets: bool) -> End {
        End {
            machine: Stream::new(us, extensions),
            unsent,
            resets,
            fin_read: false,
            queued: 0,
            received: 0,
            fin_received: false,
            finished: None,
            wire: VecDeque::new(),
        }
    }

    fn on(&mut self, input: Input) {
        let mut actions = Vec::new();
        self.machine.on(input, &mut actions);
        for action in actions {
            assert_eq!(self.finished, None, "{action:?} after the end");
            match action {
                Action::Grant(bytes) => self.wire.push_back(Input::Credit(bytes)),
                Action::Eof => self.wire.push_back(Input::PeerEof),
                Action::Close(_) => self.wire.push_back(Input::Close),
                Action::Reset => self.wire.push_back(Input::Reset),
                // Messages that are already in transit still arrive; the other end ignores them.
                Action::DropOutgoing => {}
                Action::DropIncoming => self.queued = 0,
                Action::Fin => {
                    assert_eq!(self.queued, 0, "a FIN before what it follows");
                    self.fin_received = true;
                }
                Action::Finish(ended, closing) => self.finished = Some((ended, closing)),
            }
        }
    }

    /// Reads from the application, if allowed: `share` of 256 of the possible amount.
    fn read(&mut self, share: usize) -> bool {
        if self.finished.is_some() || self.machine.may_read() == 0 || self.fin_read {
            return false;
        }
        let bytes = self.unsent.min(self.machine.may_read());
        if bytes > 0 {
            let bytes = (bytes * share / 256).max(1);
            self.unsent -= bytes;
            self.wire.push_back(Input::Payload(bytes));
            self.on(Input::Read(bytes));
        } else {
            self.fin_read = true;
            self.on(if self.resets { Input::ReadBroke } else { Input::Eof });
        }
        true
    }

    fn write(&mut self, share: usize) -> bool {
        if self.queued == 0 || self.finished.is_some() {
            return false;
        }
        let bytes = (self.queued * share / 256).max(1);
        self.queued -= bytes;
        self.received += bytes;
        self.on(Input::Wrote(bytes));
        true
    }

    fn receive(&mut self, input: Input) {
        if let Input::Payload(bytes) = input
            && self.machine.takes_payload()
        {
            self.queued += bytes;
        }
        if self.finished.is_none() {
            self.on(input);
        }
    }
}

/// Performs one step at a time, in the order of `steps` and then round robin, until no step does anything.
fn run(ends: &mut [End; 2], steps: &[(u8, u8)]) {
    let mut steps = steps.iter().copied();
    let mut turn = 0_u8;
    let mut idle = 0;
    while idle < 6 {
        let step = steps.next();
        let is_in_turn = step.is_none();
        let (which, share) = step.unwrap_or((turn, 255));
        turn = (turn + 1) % 6;
        let (which, share) = (usize::from(which % 6), usize::from(share));
        let end = which % 2;
        let done = match which / 2 {
            0 => ends[end].read(share),
            1 => ends[end].write(share),
            _ => {
                let heard = ends[1 - end].wire.pop_front();
                heard.map(|input| ends[end].receive(input)).is_some()
            }
        };
        idle = if done || !is_in_turn { 0 } else { idle + 1 };
    }
}

proptest! {
    #[test]
    fn two_ends_deliver_every_byte_and_end_for_any_delays(
        unsent in prop::array::uniform2(0..5 * WINDOW),
        switches in any::<[bool; 3]>(),
        steps in prop::collection::vec(any::<(u8, u8)>(), 0..400),
    ) {
        let [binary, credit, reset] = switches;
        let extensions = Extensions { binary, credit, half_close: true, reset };
        let mut ends = [
            End::new(Side::Downstream, extensions, unsent[0], false),
            End::new(Side::Upstream, extensions, unsent[1], false),
        ];
        run(&mut ends, &steps);
        for (end, sent) in ends.iter().zip([unsent[1], unsent[0]]) {
            prop_assert_eq!(end.finished, Some((Ended::Complete, Closing::Orderly)));
            prop_assert_eq!(end.received, sent);
            prop_assert!(end.fin_received);
        }
    }

    #[test]
    fn payload_before_a_close_or_reset_arrives_and_both_ends_end(
        unsent in 0..5 * WINDOW,
        resets: bool,
        reset: bool,
        credit: bool,
        steps in prop::collection::vec(any::<(u8, u8)>(), 0..400),
    ) {
        let extensions = Extensions { binary: true, credit, half_close: false, reset };
        let mut ends = [
            End::new(Side::Downstream, extensions, unsent, resets),
            // This end never ends by itself.
            End::new(Side::Upstream, extensions, usize::MAX / 2, false),
        ];
        // Its data has no end, so it is not read.
        ends[1].fin_read = true;
        run(&mut ends, &steps);
        let expected = if resets && reset { Closing::ResetAcknowledged } else { Closing::Acknowledged };
        prop_assert_eq!(ends[1].finished, Some((Ended::ByPeer, expected)));
        prop_assert_eq!(ends[1].received, unsent);
        let expected = if resets { Closing::Reset } else { Closing::Orderly };
        prop_assert_eq!(ends[0].finished, Some((Ended::ByUs, expected)));
    }

    #[test]
    fn for_any_events_a_stream_finishes_once_and_grants_at_most_a_window(
        inputs in prop::collection::vec(any_input(), 0..60),
        switches in any::<[bool; 3]>(),
    ) {
        let [credit, half_close, reset] = switches;
        let mut stream = stream(Extensions { binary: false, credit, half_close, reset });
        let mut finished = 0;
        for input in inputs {
            let mut actions = Vec::new();
            stream.on(input, &mut actions);
            finished += actions.iter().filter(|action| matches!(action, Action::Finish(..))).count();
            if let Some(end) = actions.iter().position(|action| matches!(action, Action::Finish(..))) {
                prop_assert_eq!(end + 1, actions.len());
            }
            prop_assert!(stream.granted + stream.queued + stream.ungranted <= WINDOW as u64 || !credit);
        }
        prop_assert!(finished <= 1);
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    let bytes = || 0..2 * WINDOW;
    prop_oneof![
        bytes().prop_map(Input::Read),
        Just(Input::Eof),
        Just(Input::ReadBroke),
        Just(Input::WriteBroke),
        bytes().prop_map(Input::Payload),
        Just(Input::Close),
        any::<u32>().prop_map(Input::Credit),
        Just(Input::PeerEof),
        Just(Input::Reset),
        bytes().prop_map(Input::Wrote),
        Just(Input::Lost),
        Just(Input::Overflow),
    ]
}
