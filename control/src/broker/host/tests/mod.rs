use bytes::Bytes;

use super::*;

const TOKEN: &str = "a-token-that-nobody-may-see";

/// A session beside a clock that is set by hand, and what it wants done since it was last looked at.
struct Bench {
    session: Session,
    now: Instant,
    out: Vec<Action>,
}

impl Bench {
    fn new(offered: Extensions) -> Bench {
        let now = Instant::now();
        let session = Session::new(Token::new(TOKEN).unwrap(), false, offered, now);
        Bench { session, now, out: Vec::new() }
    }

    /// A session whose hello was answered, with everything before that taken away.
    fn up(offered: Extensions) -> Bench {
        let mut bench = Bench::new(offered);
        bench.connect(offered);
        bench.out.clear();
        bench
    }

    fn on(&mut self, input: Input) -> &mut Bench {
        self.session.on(input, self.now, &mut self.out);
        self
    }

    fn hear(&mut self, message: ToHost) -> &mut Bench {
        self.on(Input::Text(message))
    }

    /// Lets time pass, and says so as whoever drives does: at the end, and when something was due before.
    fn pass(&mut self, time: Duration) -> &mut Bench {
        let end = self.now + time;
        while let Some(due) = self.session.due().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.on(Input::Time);
        }
        self.now = end;
        self.on(Input::Time)
    }

    fn connect(&mut self, theirs: Extensions) -> &mut Bench {
        self.pass(Duration::ZERO).on(Input::Opened(None)).hear(ToHost::HelloAck { extensions: theirs })
    }

    fn dial(&mut self, dial: u64, port: u16) -> &mut Bench {
        self.on(Input::Dial(key(dial), at(port)))
    }

    /// Everything since the last look, in short.
    fn look(&mut self) -> Vec<String> {
        std::mem::take(&mut self.out).iter().map(in_short).collect()
    }

    /// How long from now until the next attempt.
    fn rest(&mut self) -> Duration {
        assert!(!self.look().contains(&"connect".to_owned()));
        let began = self.now;
        let until = self.session.due().unwrap();
        self.pass(until - began);
        assert_eq!(self.look(), ["connect"]);
        until - began
    }
}

fn at(port: u16) -> NonZeroU16 {
    NonZeroU16::new(port).unwrap()
}

fn key(dial: u64) -> DialKey {
    DialKey { channel: 1, dial }
}

fn listener(port: u16) -> Announced {
    Announced { port: at(port), loopback: true }
}

fn data(stream: i64, text: &'static str) -> ToHost {
    ToHost::Relay(StreamId(stream), Frame::Data(Bytes::from_static(text.as_bytes())))
}

fn closed(stream: i64) -> ToHost {
    ToHost::Relay(StreamId(stream), Frame::Close(Side::Upstream))
}

fn ack(stream: i64) -> ToHost {
    ToHost::OpenAck(StreamId(stream))
}

fn nack(stream: i64) -> ToHost {
    ToHost::OpenNack { stream: StreamId(stream), reason: "refused".to_owned() }
}

fn lost() -> Input {
    Input::Lost("connection reset".to_owned())
}

fn in_short(action: &Action) -> String {
    let frame = |frame: &Frame| match frame {
        Frame::Data(payload) => format!("data {}", String::from_utf8_lossy(payload)),
        Frame::Close(side) => format!("close {side:?}"),
        other => format!("{other:?}"),
    };
    match action {
        Action::Connect => "connect".to_owned(),
        Action::Disconnect => "disconnect".to_owned(),
        Action::Say(ToContainer::Hello { credential, extensions }) => {
            let proof = if matches!(credential, Credential::Proof(_)) { " with a proof" } else { "" };
            format!(
                "say hello{proof}{}",
                if *extensions == Extensions::NONE { "" } else { " with extensions" }
            )
        }
        Action::Say(ToContainer::Subscribe) => "say subscribe".to_owned(),
        Action::Say(ToContainer::ForwardResult(result)) => {
            format!("say result {} {:?}", result.port, result.result)
        }
        Action::Say(ToContainer::Open { stream, port }) => format!("say open {} to {port}", stream.0),
        Action::Say(ToContainer::Relay(stream, sent)) => format!("say {} {}", stream.0, frame(sent)),
        Action::Say(ToContainer::Unsubscribe) => "say unsubscribe".to_owned(),
        Action::Announce(Announcement::Up) => "up".to_owned(),
        Action::Announce(Announcement::Down) => "down".to_owned(),
        Action::Announce(Announcement::Listening { opened, closed, whole }) => {
            let ports: Vec<u16> = opened.iter().map(|listener| listener.port.get()).collect();
            format!("listening {ports:?} closed {closed:?}{}", if *whole { " whole" } else { "" })
        }
        Action::Announce(Announcement::Reserve { target, candidates }) => {
            format!("reserve {target} {candidates:?}")
        }
        Action::Announce(Announcement::Stop(_)) => "announce stop".to_owned(),
        Action::Begin { stream, key } => format!("begin {} for {}", stream.0, key.dial),
        Action::Refuse { key, why } => format!("refuse {} {why:?}", key.dial),
        Action::Deliver(stream, delivered) => format!("deliver {} {}", stream.0, frame(delivered)),
        Action::Cut(stream) => format!("cut {}", stream.0),
        Action::Notice(text) => format!("notice {text}"),
        Action::Answered => "answered".to_owned(),
        Action::Rejected(reason) => format!("rejected {reason}"),
    }
}

#[test]
fn the_hello_is_first_and_the_watch_follows_its_answer() {
    let mut bench = Bench::new(Extensions::NONE);
    assert_eq!(bench.pass(Duration::ZERO).look(), ["connect"]);
    assert_eq!(bench.on(Input::Opened(None)).look(), ["say hello"]);
    bench.hear(ToHost::HelloAck { extensions: Extensions::ALL });
    assert_eq!(bench.look(), ["notice connected", "up", "say subscribe"]);
    assert_eq!(bench.session.used(), Extensions::NONE);
    let mut bench = Bench::new(Extensions::ALL);
    assert_eq!(
        bench.pass(Duration::ZERO).on(Input::Opened(None)).look(),
        ["connect", "say hello with extensions"]
    );
}

#[test]
fn an_extension_is_used_when_both_sides_list_it_on_this_connection() {
    let theirs = Extensions { binary: true, credit: true, ..Extensions::NONE };
    let mut bench = Bench::new(Extensions::ALL);
    bench.connect(theirs);
    assert_eq!(bench.session.used(), theirs);
    bench.on(lost()).pass(Duration::from_secs(1)).on(Input::Opened(None));
    assert_eq!(bench.session.used(), Extensions::NONE);
    bench.hear(ToHost::HelloAck { extensions: Extensions::NONE });
    assert_eq!(bench.session.used(), Extensions::NONE);
}

#[test]
fn nothing_counts_before_the_hello_is_answered() {
    let mut bench = Bench::new(Extensions::ALL);
    bench.pass(Duration::ZERO).on(Input::Opened(None)).look();
    bench
        .hear(ToHost::Snapshot(vec![listener(5173)]))
        .hear(ToHost::Opened(listener(5174)))
        .hear(ToHost::ForwardRequest { target: at(4848), candidates: vec![at(4848)], reason: None })
        .hear(ack(1))
        .hear(data(1, "x"))
        .on(Input::Binary(StreamId(1), Frame::Data(Bytes::from_static(b"x"))))
        .on(Input::Result(ForwardResult { port: at(5173), result: Ok(at(5173)) }));
    assert_eq!(bench.look(), Vec::<String>::new());
    assert_eq!(bench.dial(7, 5173).look(), ["refuse 7 Refused"]);
}

#[test]
fn a_refused_token_is_presented_once() {
    for reason in ["invalid token", "expected broker-hello first"] {
        let mut bench = Bench::new(Extensions::ALL);
        bench.pass(Duration::ZERO).on(Input::Opened(None)).look();
        bench.hear(ToHost::HelloNack { reason: reason.to_owned() });
        let notice = format!("notice the token is refused, and not presented again: {reason}");
        assert_eq!(bench.look(), ["disconnect", &notice, &format!("rejected {reason}")]);
        assert_eq!(bench.on(lost()).pass(Duration::from_secs(60)).look(), Vec::<String>::new());
    }
}

#[test]
fn a_hello_that_is_refused_for_now_is_repeated_later_and_told_once() {
    let mut bench = Bench::new(Extensions::ALL);
    for rest in [1, 2, 4] {
        bench.pass(Duration::ZERO).on(Input::Opened(None));
        bench.out.clear();
        let reason = format!("busy with {TOKEN}\u{1b}[31m");
        let look = bench.hear(ToHost::HelloNack { reason }).look();
        assert_eq!(look[0], "disconnect");
        assert_eq!(look.len(), if rest == 1 { 2 } else { 1 }, "{look:?}");
        assert!(look.iter().all(|line| !line.contains(TOKEN) && !line.contains('\u{1b}')), "{look:?}");
        assert_eq!(bench.rest(), Duration::from_secs(rest));
    }
}

#[test]
fn failures_in_a_row_are_rested_for_ever_longer_until_a_hello_is_answered() {
    let mut bench = Bench::new(Extensions::ALL);
    bench.pass(Duration::ZERO);
    let notice = "notice cannot connect, and is tried again until it works: connection reset";
    assert_eq!(bench.on(lost()).look(), ["connect", notice]);
    for rest in [1, 2, 4, 10, 10, 10] {
        assert_eq!(bench.rest(), Duration::from_secs(rest));
        // A WebSocket that opens and says nothing is a failure like any other, and not told again.
        assert_eq!(bench.on(Input::Opened(None)).on(lost()).look(), ["say hello with extensions"]);
    }
    bench.pass(Duration::from_secs(10)).on(Input::Opened(None));
    bench.hear(ToHost::HelloAck { extensions: Extensions::ALL }).look();
    let notice = "notice the connection is lost, and is tried again until it works: connection reset";
    assert_eq!(bench.on(lost()).look(), ["down", notice]);
    assert_eq!(bench.rest(), Duration::from_secs(1));
}

#[test]
fn an_attempt_and_a_hello_have_their_time() {
    let mut bench = Bench::new(Extensions::ALL);
    bench.pass(CONNECT_MAX - Duration::from_millis(1));
    assert_eq!(bench.look(), ["connect"]);
    bench.pass(Duration::from_millis(1));
    let notice = "notice cannot connect, and is tried again until it works: no answer within 15 s";
    assert_eq!(bench.look(), ["disconnect", notice]);
    assert_eq!(bench.rest(), Duration::from_secs(1));
    bench.on(Input::Opened(None)).pass(GREETING_MAX);
    let notice =
        "notice cannot connect, and is tried again until it works: no answer to the hello within 15 s";
    assert_eq!(bench.look(), ["say hello with extensions", "disconnect", notice]);
    assert_eq!(bench.rest(), Duration::from_secs(2));
}

#[test]
fn a_container_that_has_answered_a_challenge_never_gets_the_token() {
    let mut bench = Bench::new(Extensions::NONE);
    let answered = || Input::Opened(Some("proof".to_owned()));
    let ack = || ToHost::HelloAck { extensions: Extensions::NONE };
    bench.pass(Duration::ZERO).look();
    assert_eq!(bench.on(answered()).look(), ["say hello with a proof"]);
    assert_eq!(bench.hear(ack()).look(), ["notice connected", "answered", "up", "say subscribe"]);
    bench.on(lost()).look();
    bench.rest();
    // A peer of the reference is there now, or a program that claims to be one.
    let refused = bench.on(Input::Opened(None)).look();
    assert_eq!(refused[0], "disconnect");
    assert!(refused[1].contains("does not prove that it is this container"), "{refused:?}");
    assert_eq!(refused.len(), 2);
    bench.rest();
    bench.on(answered()).hear(ack());
    assert_eq!(bench.look().iter().filter(|told| *told == "answered").count(), 0, "it is known already");
}

#[test]
fn a_container_that_has_to_answer_from_the_start_never_gets_the_token() {
    let mut bench = Bench::new(Extensions::ALL);
    bench.session = Session::new(Token::new(TOKEN).unwrap(), true, Extensions::ALL, bench.now);
    bench.pass(Duration::ZERO).look();
    assert_eq!(bench.on(Input::Opened(None)).look()[0], "disconnect");
    bench.rest();
    assert_eq!(
        bench.on(Input::Opened(Some("proof".to_owned()))).look(),
        ["say hello with a proof with extensions"]
    );
}

#[test]
fn each_reason_of_an_outage_is_reported_once_and_a_few_at_most() {
    let mut bench = Bench::new(Extensions::ALL);
    let mut told = 0;
    for number in [1, 2, 1, 2, 3, 4, 5, 6] {
        bench.rest();
        told += bench.on(Input::Lost(format!("reason {number}"))).look().len();
    }
    assert_eq!(told, REASONS_MAX);
    bench.rest();
    bench.on(Input::Opened(None)).hear(ToHost::HelloAck { extensions: Extensions::ALL }).look();
    assert_eq!(bench.on(Input::Lost("reason 1".to_owned())).look().len(), 2, "another outage");
}

#[test]
fn what_listens_is_announced_as_it_is_told() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.hear(ToHost::Snapshot(vec![listener(8080), listener(5173), listener(8080)]));
    bench.hear(ToHost::Opened(listener(3000))).hear(ToHost::Closed(at(8080)));
    let reserve =
        ToHost::ForwardRequest { target: at(4848), candidates: vec![at(4848), at(4849)], reason: None };
    bench.hear(reserve);
    assert_eq!(
        bench.look(),
        [
            "listening [8080, 5173] closed [] whole",
            "listening [3000] closed []",
            "listening [] closed [8080]",
            "reserve 4848 [4848, 4849]",
        ]
    );
}

#[test]
fn c24_of_a_flood_of_listeners_forwarding_knows_few_and_the_others_are_answered() {
    let mut bench = Bench::up(Extensions::NONE);
    let all = || (1..=u16::MAX).map(listener).collect::<Vec<_>>();
    let counts = |did: Vec<String>| {
        let refused = did.iter().filter(|one| one.ends_with("Err(\"policy excluded\")")).count();
        let known = did.iter().find(|one| one.starts_with("listening")).map(|one| one.split(',').count());
        (did.len(), refused, known)
    };
    let excess = usize::from(u16::MAX) - LISTENING_MAX;
    assert_eq!(counts(bench.hear(ToHost::Snapshot(all())).look()), (excess + 1, excess, Some(LISTENING_MAX)));
    assert_eq!(
        bench.hear(ToHost::Opened(listener(60_000))).look(),
        ["say result 60000 Err(\"policy excluded\")"]
    );
    assert_eq!(bench.hear(ToHost::Closed(at(60_000))).look(), Vec::<String>::new(), "it is not known");
    assert_eq!(bench.hear(ToHost::Closed(at(1))).look(), ["listening [] closed [1]"]);
    assert_eq!(bench.hear(ToHost::Opened(listener(60_000))).look(), ["listening [60000] closed []"]);
    // Those that are known stay, wherever the next snapshot has them.
    let mut reversed = all();
    reversed.reverse();
    let did = bench.hear(ToHost::Snapshot(reversed)).look();
    let known = did.iter().find(|one| one.starts_with("listening")).unwrap();
    assert!(known.starts_with("listening [60000, 1024, 1023, "), "{}", &known[..80]);
}

#[test]
fn results_are_told_for_what_was_announced_on_this_connection_alone() {
    let mut bench = Bench::up(Extensions::NONE);
    let result = |port, result: Result<u16, &str>| {
        Input::Result(ForwardResult { port: at(port), result: result.map(at).map_err(str::to_owned) })
    };
    bench.on(result(5173, Ok(5173)));
    assert_eq!(bench.look(), Vec::<String>::new());
    bench.hear(ToHost::Snapshot(vec![listener(5173), listener(8973)])).look();
    bench.on(result(5173, Ok(5173))).on(result(8973, Err("policy excluded")));
    assert_eq!(bench.look(), ["say result 5173 Ok(5173)", "say result 8973 Err(\"policy excluded\")"]);
    bench.hear(ToHost::ForwardRequest { target: at(4848), candidates: Vec::new(), reason: None }).look();
    assert_eq!(bench.on(result(4848, Ok(4849))).look(), ["say result 4848 Ok(4849)"]);
    bench.on(lost()).on(result(5173, Ok(5173)));
    bench.pass(Duration::from_secs(1)).connect(Extensions::NONE).look();
    assert_eq!(bench.on(result(5173, Ok(5173))).look(), Vec::<String>::new());
}

#[test]
fn a_dial_becomes_a_stream_when_the_container_has_connected() {
    let mut bench = Bench::up(Extensions::NONE);
    assert_eq!(bench.dial(41, 5173).dial(42, 8080).look(), ["say open 1 to 5173", "say open 2 to 8080"]);
    assert_eq!(bench.hear(ack(2)).hear(ack(1)).look(), ["begin 2 for 42", "begin 1 for 41"]);
    assert_eq!(bench.hear(data(1, "hello")).hear(data(1, "")).look(), ["deliver 1 data hello"]);
    // A second answer changes nothing.
    assert_eq!(bench.hear(ack(1)).hear(nack(1)).look(), Vec::<String>::new());
}

#[test]
fn data_before_the_ack_is_kept_for_the_stream() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 5173).hear(data(1, "early")).hear(ack(1)).hear(data(1, "late"));
    let expected = ["say open 1 to 5173", "deliver 1 data early", "begin 1 for 41", "deliver 1 data late"];
    assert_eq!(bench.look(), expected);
}

#[test]
fn a_nack_refuses_its_dial_and_is_not_answered() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 5173).look();
    assert_eq!(bench.hear(nack(1)).look(), ["cut 1", "refuse 41 Refused"]);
    assert_eq!(bench.pass(DIAL_MAX).look(), Vec::<String>::new());
}

#[test]
fn a_close_ends_the_stream_once_and_is_not_answered() {
    let mut bench = Bench::up(Extensions::ALL);
    bench.dial(41, 5173).hear(ack(1)).look();
    assert_eq!(bench.hear(closed(1)).look(), ["deliver 1 close Upstream"]);
    bench.hear(data(1, "late")).hear(closed(1)).hear(ToHost::Relay(StreamId(1), Frame::Reset));
    assert_eq!(bench.look(), Vec::<String>::new());
    assert_eq!(bench.on(Input::StreamEnded(StreamId(1))).look(), Vec::<String>::new());
    // One that was opening ends as if it had been refused.
    bench.dial(42, 5173).look();
    assert_eq!(bench.hear(closed(2)).look(), ["cut 2", "refuse 42 Refused"]);
}

#[test]
fn messages_for_unknown_streams_are_ignored_and_a_late_ack_is_answered_with_a_close() {
    let mut bench = Bench::up(Extensions::ALL);
    bench.hear(data(9, "x")).hear(closed(9)).hear(nack(9));
    assert_eq!(bench.look(), Vec::<String>::new());
    for unknown in [9, 0, -1, i64::MIN, i64::MAX] {
        assert_eq!(bench.hear(ack(unknown)).look(), [format!("say {unknown} close Downstream")]);
    }
}

#[test]
fn a_dial_that_waited_long_enough_is_refused_and_its_connection_not_kept() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 5173).pass(Duration::from_secs(1)).dial(42, 5173).look();
    let first = bench.pass(DIAL_MAX - Duration::from_secs(1)).look();
    assert_eq!(first, ["cut 1", "refuse 41 TimedOut", "say 1 close Downstream"]);
    bench.hear(ack(2)).pass(DIAL_MAX);
    assert_eq!(bench.look(), ["begin 2 for 42"]);
    assert_eq!(bench.hear(ack(1)).look(), ["say 1 close Downstream"]);
}

#[test]
fn nobody_wakes_up_for_a_dial_that_was_answered() {
    let mut bench = Bench::up(Extensions::NONE);
    bench
        .dial(41, 5173)
        .pass(Duration::from_secs(1))
        .dial(42, 5173)
        .pass(Duration::from_secs(1))
        .dial(43, 5173);
    bench.hear(ack(2));
    let first = bench.session.due().unwrap();
    bench.hear(ack(1));
    assert_eq!(bench.session.due().unwrap() - first, Duration::from_secs(2));
    bench.hear(nack(3));
    assert_eq!((bench.session.due(), bench.session.dials_due.len()), (None, 0));
}

#[test]
fn nobody_waits_for_dials_of_a_channel_that_is_closed() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 5173).dial(42, 5173).hear(ack(2));
    bench.on(Input::Dial(DialKey { channel: 2, dial: 41 }, at(5173))).look();
    let look = bench.on(Input::ChannelClosed(1)).look();
    assert_eq!(look, ["cut 1", "refuse 41 Refused", "say 1 close Downstream"]);
    // What is open goes on, and so do the others.
    assert_eq!(bench.hear(data(2, "x")).hear(ack(3)).look(), ["deliver 2 data x", "begin 3 for 41"]);
}

#[test]
fn the_loss_ends_streams_and_dials_but_not_what_was_sent_whole() {
    let mut bench = Bench::up(Extensions::NONE);
    for dial in [41, 42, 43] {
        bench.dial(dial, 5173);
    }
    bench.hear(ack(1)).hear(ack(2)).hear(data(2, "all")).hear(closed(2)).look();
    let look = bench.on(lost()).look();
    assert_eq!(look[..4], ["cut 1", "cut 3", "refuse 43 Refused", "down"]);
    assert_eq!(bench.dial(44, 5173).look(), ["refuse 44 Refused"]);
    bench.on(lost()).on(Input::StreamEnded(StreamId(2)));
    assert_eq!(bench.look(), Vec::<String>::new());
}

#[test]
fn numbers_go_on_over_losses_and_round_after_the_highest() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(1, 80).dial(2, 80).on(lost());
    bench.pass(Duration::from_secs(1)).connect(Extensions::NONE).look();
    assert_eq!(bench.dial(3, 80).look(), ["say open 3 to 80"]);
    bench.session.next_stream = STREAM_ID_MAX;
    bench.session.streams.insert(StreamId(1), Stream::Flushing);
    let highest = format!("say open {STREAM_ID_MAX} to 80");
    assert_eq!(
        bench.dial(4, 80).dial(5, 80).dial(6, 80).look(),
        [&highest, "say open 2 to 80", "say open 4 to 80"]
    );
}

#[test]
fn one_stream_too_many_is_refused_until_another_has_ended() {
    let mut bench = Bench::up(Extensions::NONE);
    for dial in 1..=STREAMS_MAX as u64 {
        bench.dial(dial, 80);
    }
    bench.hear(ack(1)).look();
    assert_eq!(bench.dial(9_999, 80).look(), ["refuse 9999 Exhausted"]);
    bench.on(Input::StreamEnded(StreamId(1))).look();
    assert_eq!(bench.dial(9_999, 80).look(), [format!("say open {} to 80", STREAMS_MAX + 1)]);
}

#[test]
fn what_an_extension_brings_is_ignored_where_it_is_not_in_use() {
    for (used, heard) in [(Extensions::NONE, 0), (Extensions::ALL, 4)] {
        let mut bench = Bench::up(used);
        bench.dial(41, 80).hear(ack(1)).look();
        for frame in [Frame::Credit(5), Frame::Eof] {
            bench.hear(ToHost::Relay(StreamId(1), frame));
        }
        bench.on(Input::Binary(StreamId(1), Frame::Data(Bytes::from_static(b"x"))));
        bench.hear(ToHost::Relay(StreamId(1), Frame::Reset));
        assert_eq!(bench.look().len(), heard);
    }
}

#[test]
fn a_stop_ends_everything_and_nothing_follows() {
    let mut bench = Bench::up(Extensions::NONE);
    bench.dial(41, 80).dial(42, 80).dial(43, 80).hear(ack(1)).hear(ack(3)).hear(closed(3)).look();
    let look = bench.on(Input::Stop).look();
    assert_eq!(look, ["cut 1", "cut 2", "refuse 42 Refused", "cut 3", "disconnect", "notice stopped"]);
    bench.on(lost()).on(Input::Opened(None)).hear(ack(9)).on(Input::Stop).pass(Duration::from_secs(60));
    assert_eq!(bench.look(), Vec::<String>::new());
    assert_eq!(bench.dial(44, 80).look(), ["refuse 44 Refused"]);
    assert_eq!(bench.session.due(), None);
}

#[test]
fn a_stop_while_it_connects_leaves_nothing() {
    let mut bench = Bench::new(Extensions::NONE);
    bench.pass(Duration::ZERO);
    assert_eq!(bench.on(Input::Stop).look(), ["connect", "disconnect", "notice stopped"]);
    assert_eq!(bench.on(Input::Opened(None)).pass(Duration::from_secs(60)).look(), Vec::<String>::new());
}

mod model;
