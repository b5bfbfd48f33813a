use super::*;
use futures_util::FutureExt as _;

const PIECE: usize = PAYLOAD_BYTES_MAX;

fn room(lane: &StreamQueue, bytes: usize) -> Option<Result<Room, Gone>> {
    lane.room(bytes).now_or_never()
}

/// Queues payload until no more has room, and says how many bytes had.
fn fill(lane: &StreamQueue) -> usize {
    let mut filled = 0;
    while let Some(Ok(room)) = room(lane, PIECE) {
        lane.payload(Bytes::from(vec![7; PIECE]), room);
        filled += PIECE;
    }
    filled
}

fn next(queue: &Queue) -> String {
    match queue.next() {
        Next::Said(text) => text,
        Next::Entry(stream, Entry::Binary(frame, _) | Entry::Text(frame, _)) => {
            format!("{} of {}", frame.len(), stream.0)
        }
        Next::Entry(stream, Entry::End(frame)) => format!("{frame:?} of {}", stream.0),
        Next::Empty => "nothing".to_owned(),
        Next::Ending(ending) => format!("{ending:?}"),
    }
}

#[test]
fn a_stream_has_its_share_and_goes_on_when_some_of_it_is_written() {
    let (outbox, queue) = outbox();
    let lane = outbox.lane(StreamId(1), false);
    assert_eq!(fill(&lane), STREAM_BYTES_MAX);
    let mut waiting = Box::pin(lane.room(PIECE));
    assert!((&mut waiting).now_or_never().is_none());
    assert_eq!(next(&queue), "65536 of 1");
    assert!(matches!((&mut waiting).now_or_never(), Some(Ok(_))));
}

#[test]
fn all_streams_of_a_connection_share_its_room() {
    let (outbox, queue) = outbox();
    let lanes: Vec<StreamQueue> = (0..20).map(|stream| outbox.lane(StreamId(stream), false)).collect();
    let filled: usize = lanes.iter().map(fill).sum();
    assert_eq!(filled, CONNECTION_BYTES_MAX);
    // One that is given up makes room.
    lanes[0].discard();
    assert_eq!(fill(&lanes[19]), STREAM_BYTES_MAX);
    drop(queue);
}

#[test]
fn room_that_is_not_used_is_free_again() {
    let (outbox, queue) = outbox();
    let lane = outbox.lane(StreamId(1), true);
    for _ in 0..1000 {
        let room = room(&lane, PIECE).unwrap().unwrap();
        let mut frame = lane.header().to_vec();
        frame.push(7);
        lane.payload(frame.into(), room);
    }
    assert_eq!(outbox.0.room.available_permits(), CONNECTION_BYTES_MAX - 1000);
    assert_eq!(next(&queue), "6 of 1");
    assert_eq!(outbox.0.room.available_permits(), CONNECTION_BYTES_MAX - 999);
}

#[test]
fn what_is_said_goes_first_and_an_end_stays_behind_its_payload() {
    let (outbox, queue) = outbox();
    let lane = outbox.lane(StreamId(1), false);
    lane.payload(Bytes::from_static(b"abc"), room(&lane, 3).unwrap().unwrap());
    lane.end(Frame::Eof);
    outbox.say("said".into());
    for expected in ["said", "3 of 1", "Eof of 1", "nothing"] {
        assert_eq!(next(&queue), expected);
    }
}

#[test]
fn a_close_comes_after_what_was_said_and_nothing_after_it() {
    let (outbox, queue) = outbox();
    outbox.say("said".into());
    outbox.close(1008, "auth required");
    outbox.say("late".into());
    outbox.close(1000, "");
    assert_eq!(next(&queue), "said");
    assert_eq!(next(&queue), "Close { code: 1008, reason: \"auth required\" }");
    assert_eq!(next(&queue), "Gone");
}

#[test]
fn whoever_waits_learns_that_the_connection_is_gone() {
    let (outbox, queue) = outbox();
    let lanes: Vec<StreamQueue> = (0..20).map(|stream| outbox.lane(StreamId(stream), false)).collect();
    lanes.iter().for_each(|lane| _ = fill(lane));
    let mut for_itself = Box::pin(lanes[0].room(PIECE));
    let mut for_all = Box::pin(lanes[19].room(PIECE));
    assert!((&mut for_itself).now_or_never().is_none());
    assert!((&mut for_all).now_or_never().is_none());
    drop(queue);
    assert!(matches!((&mut for_itself).now_or_never(), Some(Err(Gone))));
    assert!(matches!((&mut for_all).now_or_never(), Some(Err(Gone))));
    assert!(matches!(room(&lanes[1], 1), Some(Err(Gone))));
    outbox.say("into the void".into());
}

#[test]
fn a_peer_that_asks_and_does_not_read_is_cut_off() {
    let (outbox, queue) = outbox();
    for _ in 0..SAID_BYTES_MAX / (1000 + 64) {
        outbox.say("x".repeat(1000));
    }
    assert!(matches!(queue.next(), Next::Said(_)));
    outbox.say("x".repeat(1000));
    outbox.say("x".repeat(1000));
    assert_eq!(next(&queue), "Flooded");
}
