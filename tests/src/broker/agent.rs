//! `landfall agent` in a namespace, as in a container.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::{Home, Namespace, wait_until};

/// A running agent; dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    output: PathBuf,
    /// The thread inside that started the agent. The kernel ends the agent when this thread ends.
    _inside: (mpsc::Sender<()>, JoinHandle<()>),
}

impl Agent {
    /// Returns a command that runs `landfall agent` with this token in its environment (an empty token: without the
    /// variable).
    pub fn command(home: &Home, token: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(Home::program());
        let plain = home.command(&[]);
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.arg("agent").stdin(std::process::Stdio::null()).env("LANDFALL_CONTAINER_NAME", "inner");
        if !token.is_empty() {
            command.env("LANDFALL_HOSTD_BROKER_TOKEN", token);
        }
        command
    }

    /// Starts the agent inside, and waits until it listens on the container port.
    ///
    /// # Panics
    /// If it does not listen.
    #[track_caller]
    pub fn start(home: &Home, inside: &Namespace, token: &str) -> Agent {
        Agent::spawn(home, inside, Agent::command(home, token))
    }

    /// The same with a command of the caller.
    ///
    /// # Panics
    /// If it does not listen.
    #[track_caller]
    pub fn spawn(home: &Home, inside: &Namespace, mut command: Command) -> Agent {
        let output =
            home.folder("agents").join(format!("said-{}", rustix::thread::gettid().as_raw_nonzero()));
        let file = File::options().append(true).create(true).open(&output).unwrap();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let (sender, started) = mpsc::channel();
        let (alive, ended) = mpsc::channel::<()>();
        let namespace = inside.duplicate();
        // The agent dies with the thread that starts it, so that thread waits for it.
        let thread = std::thread::spawn(move || {
            namespace.run(move || {
                sender.send(command.spawn().expect("setpriv (util-linux)")).unwrap();
                let _ = ended.recv();
            });
        });
        let child = started.recv().unwrap();
        let mut agent = Agent { child, output, _inside: (alive, thread) };
        let target = std::net::SocketAddr::from(([127, 0, 0, 1], super::CONTAINER_PORT));
        wait_until("the agent to listen", || {
            if let Some(status) = agent.child.try_wait().unwrap() {
                panic!("the agent ended ({status}); output:\n{}", agent.printed());
            }
            inside.run(|| std::net::TcpStream::connect(target)).map(drop)
        });
        agent
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything that the agent has printed on both outputs.
    pub fn printed(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.output).unwrap_or_default()).into_owned()
    }

    /// Kills the agent with SIGKILL.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The agent may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("output of the agent:\n{}", self.printed());
        }
    }
}
