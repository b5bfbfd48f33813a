//! Forwarding on a thread of its own, or in a process that may be killed.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;

use landfall::docker::Docker;
use landfall::forwarding::driver::{Forwarding, ForwardingOptions};
use landfall::model::forward_table::{ContainerState, ForwardTable, RowState};
use landfall::model::port_policy::ControlPorts;
use landfall::model::registration::{AttachMethod, Registration};
use landfall::registry::store::Registered;
use landfall::sys::journal::Journal;
use landfall::sys::paths::Home;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::namespace::{Namespace, until};

/// A home and its registrations.
pub(crate) struct World {
    pub(crate) home: Home,
    pub(crate) runtime: Handle,
    _end: tokio::sync::oneshot::Sender<()>,
    pub(crate) registered: watch::Sender<Arc<Registered>>,
    forwarding: Option<Forwarding>,
    _folder: tempfile::TempDir,
}

pub(crate) fn attach_method_of(namespace: &Namespace) -> AttachMethod {
    AttachMethod::Process { pid: namespace.pid(), started: None }
}

pub(crate) fn registration(name: &str, attach_method: &AttachMethod) -> Registration {
    let fields = json!({ "containerName": name, "cwd": "/", "way": attach_method });
    Registration::from_fields(fields.as_object().unwrap().clone()).unwrap()
}

impl World {
    pub(crate) fn new() -> World {
        let folder = tempfile::Builder::new().prefix("landfall-forwarding").tempdir().unwrap();
        let home = Home::at(folder.path().to_owned()).unwrap();
        home.ensure_directories().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        // Forwarding continues while the test waits.
        let (end, ends) = tokio::sync::oneshot::channel::<()>();
        std::thread::spawn(move || runtime.block_on(ends));
        let registered = watch::Sender::new(Arc::default());
        World { home, runtime: handle, _end: end, registered, forwarding: None, _folder: folder }
    }

    pub(crate) fn start(&mut self) {
        let _inside = self.runtime.enter();
        self.forwarding = Some(start(&self.home, self.registered.subscribe()));
    }

    pub(crate) fn forwarding(&self) -> &Forwarding {
        self.forwarding.as_ref().unwrap()
    }

    pub(crate) fn register(&self, entries: &[(&str, &AttachMethod)]) {
        let entries =
            entries.iter().map(|(name, attach_method)| Arc::new(registration(name, attach_method))).collect();
        self.registered.send_replace(Arc::new(Registered { entries }));
    }

    pub(crate) fn table(&self) -> ForwardTable {
        self.runtime.block_on(self.forwarding().table())
    }

    pub(crate) fn container(&self, name: &str) -> Option<ContainerState> {
        self.table().containers.into_iter().find(|container| container.container_name == name)
    }

    pub(crate) fn row_state(&self, name: &str, port: u16) -> Option<RowState> {
        let rows = self.container(name)?.forwards;
        rows.into_iter().find(|row| row.port == port).map(|row| row.state)
    }

    pub(crate) fn engine(&self) -> Option<u32> {
        self.table().engine?.pid
    }

    /// Kills the engine, which this test's own driver started.
    pub(crate) fn kill_engine(&self, engine: u32) {
        kill_process(pid(engine), Signal::KILL).unwrap();
    }

    /// Kills the engine and waits for the next one.
    pub(crate) fn lose_engine(&self) {
        let engine = until("the engine runs", || self.engine());
        self.kill_engine(engine);
        until("another engine runs", || self.engine().filter(|now| *now != engine));
    }

    pub(crate) fn detach(&mut self) {
        let forwarding = self.forwarding.take().unwrap();
        self.runtime.block_on(forwarding.detach());
    }

    /// Waits until `count` lines of the journal contain this text, and returns them. A line is written shortly after
    /// the event.
    pub(crate) fn wait_for_lines(&self, text: &str, count: usize) -> Vec<String> {
        until(text, || Some(self.log(text)).filter(|lines| lines.len() >= count))
    }

    /// Every line of the journal so far that contains this text.
    pub(crate) fn log(&self, text: &str) -> Vec<String> {
        let log = std::fs::read_to_string(self.home.daemon_log()).unwrap_or_default();
        log.lines().filter(|line| line.contains(text)).map(str::to_owned).collect()
    }
}

pub(crate) fn pid(number: u32) -> Pid {
    Pid::from_raw(i32::try_from(number).unwrap()).unwrap()
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", std::fs::read_to_string(self.home.daemon_log()).unwrap_or_default());
        }
        // The engine ends with its test.
        if self.forwarding.is_none() {
            self.start();
            until("the engine is attached, or there is none", || {
                (self.engine().is_some() || !self.home.engine_socket().exists()).then_some(())
            });
        }
        let forwarding = self.forwarding.take().unwrap();
        self.runtime.block_on(forwarding.stop_engine());
    }
}

fn start(home: &Home, registrations: watch::Receiver<Arc<Registered>>) -> Forwarding {
    Forwarding::start(ForwardingOptions {
        home: home.clone(),
        journal: Journal::open(&home.daemon_log()).unwrap(),
        docker: Docker::from_environment(),
        helper: None,
        replayed: Box::pin(std::future::ready(())),
        registrations,
        control_ports: ControlPorts::default(),
    })
}

/// A driver in a process of its own, with the version in its environment.
pub(crate) struct Drive(Child);

impl Drive {
    /// Starts the driver, and waits until `port` is open.
    pub(crate) fn start(home: &Home, version: &str, name: &str, namespace: &Namespace, port: u16) -> Drive {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg("_drive")
            .arg(home.root())
            .args([name, &namespace.pid().to_string(), &port.to_string()])
            .env(landfall::version::VARIABLE, version)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "open\n");
        Drive(child)
    }

    pub(crate) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The process of [`Drive`].
pub(crate) fn drive(arguments: &[String]) -> ExitCode {
    let [home, name, pid, port] = arguments else { return ExitCode::FAILURE };
    let home = Home::at(PathBuf::from(Path::new(home))).unwrap();
    let port: u16 = port.parse().unwrap();
    let attach_method = AttachMethod::Process { pid: pid.parse().unwrap(), started: None };
    let entries = vec![Arc::new(registration(name, &attach_method))];
    let registered = watch::Sender::new(Arc::new(Registered { entries }));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let forwarding = start(&home, registered.subscribe());
        while !forwarding.forwarded_ports(name).contains(&port) {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        println!("open");
        std::future::pending::<()>().await;
    });
    ExitCode::SUCCESS
}
