use super::*;
use futures_util::FutureExt as _;

const PIECE: usize = PAYLOAD_BYTES_MAX;

fn room(stream_queue: &StreamQueue, bytes: usize) -> Option<Result<Room, Gone>> {
    stream_queue.room(bytes).now_or_never()
}

/// Queues payload until the limit is reached, and returns the number of queued bytes.
fn fill(stream_queue: &StreamQueue) -> usize {
    let mut filled = 0;
    while let Some(Ok(room)) = room(stream_queue, PIECE) {
        stream_queue.payload(Bytes::from(vec![7; PIECE]), room);
        filled += PIECE;
    }
    filled
}

fn next(queue: &Queue) -> String {
    match queue.next() {
        Next::Control(text) => text,
        Next::Entry(stream, Entry::Binary(frame, _) | Entry::Text(frame, _)) => {
            format!("{} of {}", frame.len(), stream.0)
        }
        Next::Entry(stream, Entry::End(frame)) => format!("{frame:?} of {}", stream.0),
        Next::Empty => "nothing".to_owned(),
        Next::Ending(ending) => format!("{ending:?}"),
    }
}

#[test]
fn a_stream_has_a_limit_and_continues_after_a_write() {
    let (outbox, queue) = outbox();
    let stream_queue = outbox.stream_queue(StreamId(1), false);
    assert_eq!(fill(&stream_queue), STREAM_BYTES_MAX);
    let mut waiting = Box::pin(stream_queue.room(PIECE));
    assert!((&mut waiting).now_or_never().is_none());
    assert_eq!(next(&queue), "65536 of 1");
    assert!(matches!((&mut waiting).now_or_never(), Some(Ok(_))));
}

#[test]
fn all_streams_of_a_connection_share_its_limit() {
    let (outbox, queue) = outbox();
    let lanes: Vec<StreamQueue> =
        (0..20).map(|stream| outbox.stream_queue(StreamId(stream), false)).collect();
    let filled: usize = lanes.iter().map(fill).sum();
    assert_eq!(filled, CONNECTION_BYTES_MAX);
    // Discarding a stream returns its permits.
    lanes[0].discard();
    assert_eq!(fill(&lanes[19]), STREAM_BYTES_MAX);
    drop(queue);
}

#[test]
fn unused_permits_are_returned() {
    let (outbox, queue) = outbox();
    let stream_queue = outbox.stream_queue(StreamId(1), true);
    for _ in 0..1000 {
        let room = room(&stream_queue, PIECE).unwrap().unwrap();
        let mut frame = stream_queue.header().to_vec();
        frame.push(7);
        stream_queue.payload(frame.into(), room);
    }
    assert_eq!(outbox.0.room.available_permits(), CONNECTION_BYTES_MAX - 1000);
    assert_eq!(next(&queue), "6 of 1");
    assert_eq!(outbox.0.room.available_permits(), CONNECTION_BYTES_MAX - 999);
}

#[test]
fn control_messages_are_first_and_an_end_follows_its_payload() {
    let (outbox, queue) = outbox();
    let stream_queue = outbox.stream_queue(StreamId(1), false);
    stream_queue.payload(Bytes::from_static(b"abc"), room(&stream_queue, 3).unwrap().unwrap());
    stream_queue.end(Frame::Eof);
    outbox.send_control("said".into());
    for expected in ["said", "3 of 1", "Eof of 1", "nothing"] {
        assert_eq!(next(&queue), expected);
    }
}

#[test]
fn a_close_follows_control_messages_and_ends_the_queue() {
    let (outbox, queue) = outbox();
    outbox.send_control("said".into());
    outbox.close(1008, "auth required");
    outbox.send_control("late".into());
    outbox.close(1000, "");
    assert_eq!(next(&queue), "said");
    assert_eq!(next(&queue), "Close { code: 1008, reason: \"auth required\" }");
    assert_eq!(next(&queue), "Gone");
}

#[test]
fn waiting_senders_are_notified_of_the_end_of_the_connection() {
    let (outbox, queue) = outbox();
    let lanes: Vec<StreamQueue> =
        (0..20).map(|stream| outbox.stream_queue(StreamId(stream), false)).collect();
    lanes.iter().for_each(|stream_queue| _ = fill(stream_queue));
    let mut for_itself = Box::pin(lanes[0].room(PIECE));
    let mut for_all = Box::pin(lanes[19].room(PIECE));
    assert!((&mut for_itself).now_or_never().is_none());
    assert!((&mut for_all).now_or_never().is_none());
    drop(queue);
    assert!(matches!((&mut for_itself).now_or_never(), Some(Err(Gone))));
    assert!(matches!((&mut for_all).now_or_never(), Some(Err(Gone))));
    assert!(matches!(room(&lanes[1], 1), Some(Err(Gone))));
    outbox.send_control("into the void".into());
}

#[test]
fn a_peer_that_does_not_read_answers_is_disconnected() {
    let (outbox, queue) = outbox();
    for _ in 0..CONTROL_BYTES_MAX / (1000 + 64) {
        outbox.send_control("x".repeat(1000));
    }
    assert!(matches!(queue.next(), Next::Control(_)));
    outbox.send_control("x".repeat(1000));
    outbox.send_control("x".repeat(1000));
    assert_eq!(next(&queue), "Flooded");
}
