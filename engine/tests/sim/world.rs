//! One run: a shard over a simulated poller, clients and servers, a driver that interferes, and the checks.

use std::collections::HashMap;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use landfall_engine::command::{Ending, Family, ForwardId, ForwardState, Reach, UpstreamId, UpstreamKind};
use landfall_engine::limits::Limits;
use landfall_engine::reactor::fake::{Dice, EndId, FakeNet, FakePoller, Faults, HOST, Knob};
use landfall_engine::shard::{Report, Shard, ShardCommand};

use crate::far::{Far, Finish, StreamEnd};

/// More turns than any run needs; a run that exceeds them makes no progress.
const TURNS_MAX: u64 = 1_000_000;

pub(crate) struct World {
    net: FakeNet,
    shard: Shard<FakePoller>,
    limits: Limits,
    dice: Dice,
    fars: Vec<Far>,
    /// The index of each far end in `fars`.
    by_end: HashMap<EndId, usize>,
    ports: Vec<u16>,
    upstreams: Vec<UpstreamId>,
    /// The namespaces of the upstreams.
    namespaces: Vec<u64>,
    clients_left: u32,
    dial_at: Instant,
    interfere_at: Option<Instant>,
    started: Instant,
    /// Whether the driver has reset a connection, so that connections may end without a cause at their far ends.
    forced: bool,
    stopping: bool,
    stopped: u32,
    /// Forwards whose listener was opened and not closed since.
    open: Vec<ForwardId>,
    pub(crate) ended: u64,
}

fn host_port(forward: ForwardId) -> NonZeroU16 {
    NonZeroU16::new(1_000 + u16::try_from(forward.0).unwrap()).unwrap()
}

fn limits(dice: &mut Dice) -> Limits {
    let tiny = dice.chance(500);
    Limits {
        connections_max: if dice.chance(200) { 3 } else { 1_000 },
        buffer_bytes: dice.size(1, if tiny { 64 } else { 4_000 }).max(4),
        buffers_max: dice.size(2, if tiny { 3 } else { 200 }),
        pipe_bytes: dice.size(4_000, 8_000),
        pipes_max: dice.size(0, if tiny { 1 } else { 8 }),
        turn_bytes: dice.size(1, if tiny { 200 } else { 20_000 }),
        promote_after: u8::try_from(dice.range(1, 3)).unwrap(),
        demote_after: u8::try_from(dice.range(1, 4)).unwrap(),
        stock_max: dice.size(1, 16),
        stock_min: dice.size(1, 2),
        connect_timeout: Duration::from_millis(dice.range(100, 3_000)),
        reset_drain_timeout: Duration::from_millis(if dice.chance(200) { 50 } else { 600_000 }),
        accept_burst: u32::try_from(dice.range(1, 8)).unwrap(),
        exhausted_pause: Duration::from_millis(dice.range(1, 100)),
        ..Limits::default()
    }
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        let mut dice = Dice::new(seed ^ 0x5eed);
        let faults = if dice.chance(100) { Faults::none() } else { Faults::random(&mut dice) };
        let limits = limits(&mut dice);
        let net = FakeNet::new(seed, faults);
        let shard = Shard::new(FakePoller::reactor(&net, &limits), limits.clone());
        let now = net.net().now();
        let clients_left = match dice.range(0, 9) {
            0 => dice.range(50, 200),
            _ => dice.range(1, 25),
        };
        let interfere_at = dice.chance(500).then(|| now + Duration::from_micros(dice.range(0, 300_000)));
        let mut world = World {
            net,
            shard,
            limits,
            dice,
            fars: Vec::new(),
            by_end: HashMap::new(),
            ports: Vec::new(),
            upstreams: Vec::new(),
            namespaces: Vec::new(),
            clients_left: u32::try_from(clients_left).unwrap(),
            dial_at: now,
            interfere_at,
            started: now,
            forced: false,
            stopping: false,
            stopped: 0,
            open: Vec::new(),
            ended: 0,
        };
        world.set_up();
        world
    }

    pub(crate) fn fired(&self, knob: Knob) -> u64 {
        self.net.net().faults().fired(knob)
    }

    pub(crate) fn turns(&self) -> u64 {
        self.net.net().turns()
    }

    fn set_up(&mut self) {
        for number in 0..self.dice.range(1, 3) {
            let upstream = UpstreamId(u32::try_from(number).unwrap());
            let kind = match self.dice.range(0, 9) {
                0..=2 => UpstreamKind::Dialler,
                3..=5 => UpstreamKind::Agent,
                6 => UpstreamKind::Host,
                _ => UpstreamKind::Opener,
            };
            let channel = match kind {
                UpstreamKind::Dialler => Some(self.net.driver(number)),
                UpstreamKind::Opener | UpstreamKind::Agent => Some(self.net.channel(number)),
                UpstreamKind::Host => None,
            };
            self.namespaces.push(if kind == UpstreamKind::Host { HOST } else { number });
            self.shard.command(ShardCommand::AddUpstream { upstream, kind, channel, netns_cookie: number });
            self.upstreams.push(upstream);
        }
        for number in 0..self.dice.range(1, 4) {
            self.open_forward(u16::try_from(number).unwrap());
        }
    }

    fn reach(&mut self) -> Reach {
        Reach { v4: self.dice.chance(700), v6: self.dice.chance(700) }
    }

    fn open_forward(&mut self, number: u16) {
        let forward = ForwardId(u32::from(number));
        let host_port = host_port(forward);
        let target_port = NonZeroU16::new(3000 + number).unwrap();
        let reach = self.reach();
        let upstream = self.upstreams[self.dice.size(0, self.upstreams.len() - 1)];
        for family in Family::ALL {
            if self.dice.chance(800) {
                let window = self.dice.size(1, 6_000);
                let namespace = self.namespaces[upstream.0 as usize];
                self.net.net().serve(namespace, family.loopback(target_port), window);
            }
        }
        let families = if self.dice.chance(800) { &Family::ALL[..] } else { &Family::ALL[..1] };
        let sockets = families.iter().map(|family| self.net.listen(host_port.get(), *family)).collect();
        self.open.push(forward);
        self.ports.push(host_port.get());
        let command =
            ShardCommand::OpenListener { forward, upstream, host_port, target_port, reach, sockets };
        self.shard.command(command);
    }

    /// Runs to the end. Returns the fault that was found.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        while self.stopped == 0 {
            self.act()?;
            self.shard.turn().map_err(|error| error.to_string())?;
            self.process_reports()?;
            if self.net.net().is_deadlocked() && !self.is_idle() {
                return Err(format!("no event will follow: {}", self.stuck()));
            }
            if self.turns() > TURNS_MAX {
                return Err(format!("the turns make no progress: {}", self.stuck()));
            }
        }
        self.drain_fars()?;
        self.check_end()
    }

    fn is_idle(&self) -> bool {
        self.clients_left == 0 && self.shard.connections() == 0
    }

    fn stuck(&mut self) -> String {
        let reactor = format!("{:?}", self.shard.reactor_mut());
        let net = self.net.net();
        let far = |far: &Far| {
            let near = net.near(far.id);
            format!(
                "\n  {} (client {}) sent {} read {} fin {} left {} end {:?} to {:?} near {:?}",
                far.stream,
                far.is_client,
                far.sent,
                far.read,
                far.fin,
                far.left,
                far.end_seen,
                net.opposite(far.id),
                near.map(|near| (net.is_closed(near), net.is_broken(near), net.arrived(near))),
            )
        };
        let open: Vec<String> = self.fars.iter().filter(|far| !far.left).map(far).collect();
        let connections = self.shard.connections();
        format!("{connections} connections, stopping {}, {}\n{reactor}", self.stopping, open.concat())
    }

    /// Carries out the steps of the clients, the servers and the driver that are due.
    fn act(&mut self) -> Result<(), String> {
        let now = self.net.net().now();
        while self.clients_left > 0 && self.dial_at <= now {
            self.dial(now);
        }
        if self.interfere_at.is_some_and(|at| at <= now) {
            self.interfere(now);
            self.process_reports()?;
        }
        if self.is_idle() && !self.stopping && self.fars.iter().all(Far::is_over) {
            self.shard.command(ShardCommand::Describe);
            self.process_reports()?;
            self.stop();
        }
        self.step_fars()?;
        let now = self.net.net().now();
        let fars = self.fars.iter().filter_map(|far| far.act_at(now));
        let dial = (self.clients_left > 0).then_some(self.dial_at);
        let act_at = fars.chain(dial).chain(self.interfere_at).min();
        self.net.net().act_at(act_at);
        Ok(())
    }

    fn step_fars(&mut self) -> Result<(), String> {
        let now = self.net.net().now();
        let newcomers = self.net.net().newcomers();
        for newcomer in newcomers {
            self.add(newcomer.end, false, now);
        }
        for index in 0..self.fars.len() {
            let had = self.fars[index].end_seen;
            self.fars[index].step(&self.net, &mut self.dice)?;
            if had.is_none() {
                self.check_end_seen(index)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, end: EndId, is_client: bool, now: Instant) {
        let stream = u32::try_from(self.fars.len()).unwrap();
        self.by_end.insert(end, self.fars.len());
        // With small buffers or turns a long stream takes many rounds without testing more.
        let most = self.limits.buffer_bytes.min(self.limits.turn_bytes) as u64 * 100;
        self.fars.push(Far::new(end, stream, is_client, most, &mut self.dice, now));
    }

    fn dial(&mut self, now: Instant) {
        self.clients_left -= 1;
        let burst = self.dice.chance(700);
        let pause = if burst { 0 } else { self.dice.range(1, 40_000) };
        self.dial_at = now + Duration::from_micros(pause);
        let port = self.ports[self.dice.size(0, self.ports.len() - 1)];
        let family = Family::ALL[self.dice.size(0, 1)];
        let window = self.dice.size(1, 6_000);
        let dialled = self.net.net().dial(port, family, window);
        if let Some(end) = dialled {
            self.add(end, true, now);
        }
    }

    fn interfere(&mut self, now: Instant) {
        let again = self.dice.chance(700);
        self.interfere_at = again.then(|| now + Duration::from_micros(self.dice.range(1, 300_000)));
        let forward = ForwardId(u32::try_from(self.dice.range(0, 4)).unwrap());
        let upstream = UpstreamId(u32::try_from(self.dice.range(0, 3)).unwrap());
        let ending = if self.dice.chance(500) { Ending::Reset } else { Ending::Drain };
        let command = match self.dice.range(0, 19) {
            0..=4 => ShardCommand::SetReach { forward, reach: self.reach() },
            5..=8 => ShardCommand::CloseListener { forward, ending },
            9..=10 => ShardCommand::RemoveUpstream { upstream, ending },
            11 => {
                if let Some(namespace) = self.namespaces.get(upstream.0 as usize) {
                    self.net.net().end_opener(*namespace);
                }
                return;
            }
            12..=13 => {
                let port = NonZeroU16::new(3000 + u16::try_from(forward.0).unwrap()).unwrap();
                let family = Family::ALL[self.dice.size(0, 1)];
                if let Some(namespace) = self.namespaces.get(upstream.0 as usize) {
                    self.net.net().stop_serving(*namespace, family.loopback(port));
                }
                return;
            }
            14 => return self.stop(),
            _ => ShardCommand::Describe,
        };
        let resets = matches!(
            command,
            ShardCommand::CloseListener { ending: Ending::Reset, .. }
                | ShardCommand::RemoveUpstream { ending: Ending::Reset, .. }
        );
        self.forced |= resets;
        self.shard.command(command);
    }

    fn stop(&mut self) {
        self.stopping = true;
        if self.dice.chance(500) {
            self.forced |= self.shard.connections() > 0;
            self.shard.command(ShardCommand::Stop);
        } else {
            self.shard.command(ShardCommand::Drain);
        }
    }

    fn process_reports(&mut self) -> Result<(), String> {
        let reports: Vec<Report> = self.shard.reports().collect();
        for report in reports {
            if self.stopped > 0 {
                return Err(format!("a report after the end: {report:?}"));
            }
            match report {
                Report::Stopped => self.stopped += 1,
                Report::ListenerClosed { forward, .. } => {
                    let port = host_port(forward);
                    if self.net.net().is_bound(port) {
                        return Err(format!("port {port} is bound and was reported as free"));
                    }
                }
                Report::State { forwards } => self.check_state(&forwards)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Checks the end that a far end has just seen.
    fn check_end_seen(&mut self, index: usize) -> Result<(), String> {
        let far = &self.fars[index];
        let opposite = self.net.net().opposite(far.id).and_then(|end| self.by_end.get(&end));
        let opposite = opposite.map(|index| &self.fars[*index]);
        if let (Some(stream), Some(opposite)) = (far.receives, opposite)
            && stream != opposite.stream
        {
            return Err(format!("{} receives {stream} instead of {}", far.stream, opposite.stream));
        }
        if far.end_seen != Some(StreamEnd::Eof) {
            return Ok(());
        }
        match opposite {
            Some(opposite) if !opposite.fin => {
                Err(format!("{} saw an end that {} never sent", far.stream, opposite.stream))
            }
            Some(opposite) if opposite.sent != far.read => {
                Err(format!("{} saw an end after {} of {} bytes", far.stream, far.read, opposite.sent))
            }
            None if far.is_client => {
                Err(format!("client {} never reached a server and saw a clean end", far.stream))
            }
            _ => Ok(()),
        }
    }

    fn check_state(&self, forwards: &[ForwardState]) -> Result<(), String> {
        let mut open = 0;
        for state in forwards {
            let stats = state.stats;
            let ended = stats.completed
                + stats.reset_by_downstream
                + stats.reset_by_upstream
                + stats.refused
                + stats.exhausted;
            let end_seen = stats.open + ended;
            if end_seen > stats.accepted || (end_seen < stats.accepted && !self.forced) {
                return Err(format!("the counters do not add up: {stats:?}"));
            }
            open += stats.open;
        }
        let connections = u64::try_from(self.shard.connections()).unwrap();
        if open != connections {
            return Err(format!("{open} connections are counted and {connections} exist"));
        }
        Ok(())
    }

    /// Lets the far ends read the remaining bytes after the shard has ended.
    fn drain_fars(&mut self) -> Result<(), String> {
        for _ in 0..100_000 {
            self.step_fars()?;
            let now = self.net.net().now();
            let next = self.fars.iter().filter_map(|far| far.act_at(now)).min();
            if !self.net.net().pass_time(next) {
                return Ok(());
            }
        }
        Err("the far ends never finish".into())
    }

    fn check_end(&mut self) -> Result<(), String> {
        if self.stopped != 1 || !self.shard.is_stopped() {
            return Err(format!("it reported {} times that it has stopped", self.stopped));
        }
        if self.shard.connections() != 0 {
            return Err("it has stopped with connections".into());
        }
        let reactor = self.shard.reactor_mut();
        let (lent, registered) = (reactor.io().lent(), reactor.registered());
        if lent != (0, 0) || registered != 0 {
            return Err(format!("{lent:?} are still lent, {registered} registered"));
        }
        let descriptors = self.net.net().descriptors();
        if descriptors != 0 {
            return Err(format!("{descriptors} descriptors are still open"));
        }
        for far in &self.fars {
            self.check_far(far)?;
            self.ended += u64::from(far.is_client);
        }
        Ok(())
    }

    fn check_far(&self, far: &Far) -> Result<(), String> {
        let net = self.net.net();
        if !far.left {
            return Err(format!("{} never saw an end: {far:?}", far.stream));
        }
        let Some(opposite) = net.opposite(far.id).and_then(|end| self.by_end.get(&end)) else {
            return Ok(());
        };
        let opposite = &self.fars[*opposite];
        let plain = far.finish == Finish::Fin && opposite.finish == Finish::Fin && !self.forced;
        if plain && (far.end_seen != Some(StreamEnd::Eof) || far.cut) {
            return Err(format!("{} was reset, and {} did not do it: {far:?}", far.stream, opposite.stream));
        }
        // It has read to the end, so it received every byte that the relay had received for it.
        let patient = self.limits.reset_drain_timeout > Duration::from_secs(60);
        if let (Some(_), Some(source), false, true) =
            (far.end_seen, net.near(opposite.id), self.forced, patient)
        {
            let arrived = net.arrived(source);
            if far.read != arrived {
                return Err(format!(
                    "{} got {} bytes of {arrived} that {} had sent: {far:?} {opposite:?}",
                    far.stream, far.read, opposite.stream
                ));
            }
        }
        Ok(())
    }

    /// Returns the duration of the run, in virtual time.
    pub(crate) fn lasted(&mut self) -> Duration {
        self.shard.reactor_mut().now() - self.started
    }
}
